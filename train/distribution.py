"""How several processes share the work: whole copies (DDP), FSDP2, or DeepSpeed ZeRO.

accelerate shares out the ControlNet's weights, gradients and optimiser state as its configuration
says (configs/accelerate/ has some); the frozen transformer is whole on every device. Here is what
the rest of training must know of it.
"""

import math
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import SD3ControlNetModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import ConfigError
from train.config import TrainConfig
from train.optim import fused_backward

Way = Literal["copies", "fsdp", "deepspeed"]
WAYS: dict[DistributedType, Way] = {
    DistributedType.NO: "copies",
    DistributedType.MULTI_CPU: "copies",
    DistributedType.MULTI_GPU: "copies",
    DistributedType.FSDP: "fsdp",
    DistributedType.DEEPSPEED: "deepspeed",
}
WAY_NAMES: dict[Way, str] = {
    "copies": "one process or DDP",
    "fsdp": "FSDP2",
    "deepspeed": "DeepSpeed",
}
ZERO_STAGES = (2, 3)
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0


def way(accelerator: Accelerator) -> Way:
    """Return how the processes share the ControlNet."""
    return WAYS[accelerator.distributed_type]


def check(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse ways of sharing the work that training cannot go.

    Raises:
        ConfigError: naming the way, or the option that does not go with it.
    """
    if accelerator.distributed_type not in WAYS:
        raise ConfigError(
            f"accelerate is set up for {accelerator.distributed_type.value}; training goes with "
            "one device, DDP, FSDP2 and DeepSpeed: see configs/accelerate/."
        )
    if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
        raise ConfigError(
            f"--gradient-accumulation-steps {config.gradient_accumulation_steps}: accelerate's own "
            f"configuration says {accelerator.gradient_accumulation_steps}; remove it there."
        )
    if config.fused_backward_pass:
        fused_backward.check(
            config,
            num_processes=accelerator.num_processes,
            scales=accelerator.scaler is not None,
        )
    device = accelerator.device
    if config.fp8_matmul and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise ConfigError(
                f"--fp8-matmul: {torch.cuda.get_device_name(device)} has none (compute capability "
                f"{'.'.join(map(str, capability))}, {'.'.join(map(str, FP8_CAPABILITY))} is "
                "needed); leave it out, --quantize-base fp8 works without."
            )
    if config.bf16_weights:
        if accelerator.num_processes > 1:
            raise ConfigError("--bf16-weights: each process would round in its own way; use one.")
        if accelerator.mixed_precision != "bf16":
            raise ConfigError("--bf16-weights: goes with --mixed-precision bf16.")
    if way(accelerator) == "copies":
        return
    for option in ("offload_optimizer", "offload_activations"):
        if getattr(config, option):
            raise ConfigError(
                f"--{option.replace('_', '-')}: accelerate's own configuration says what is "
                "offloaded with FSDP2 and DeepSpeed; leave it out, or train with DDP."
            )
    if config.use_8bit_adam:
        raise ConfigError(
            "--use-8bit-adam: its state cannot be shared out; leave it out, or train with DDP."
        )
    if way(accelerator) == "fsdp":
        if not accelerator.is_fsdp2:
            raise ConfigError(
                "accelerate is set up for the first FSDP: its configuration needs fsdp_version: 2, "
                "as in configs/accelerate/fsdp2.yaml."
            )
        return
    stage = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage not in ZERO_STAGES:
        raise ConfigError(
            f"accelerate is set up for ZeRO stage {stage}: use 2 or 3, as in configs/accelerate/, "
            "or DDP."
        )
    instead = "leave it out, or train with FSDP2 (configs/accelerate/fsdp2.yaml)."
    if config.ema_decay is not None:
        raise ConfigError(f"--ema-decay: DeepSpeed keeps the exact weights to itself; {instead}")
    if config.on_nonfinite == "skip":
        raise ConfigError(f"--on-nonfinite skip: DeepSpeed cannot be held back; {instead}")


def prepare(
    accelerator: Accelerator,
    config: TrainConfig,
    controlnet: SD3ControlNetModel,
    optimizer: Any,
    schedule: Any,
) -> tuple[Any, Any, Any]:
    """Return ControlNet, optimiser and schedule as accelerate prepares them."""
    if way(accelerator) != "deepspeed":
        prepared: tuple[Any, Any, Any] = accelerator.prepare(controlnet, optimizer, schedule)
        return prepared
    accelerator.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }
    buffers = {name: buffer.clone() for name, buffer in controlnet.named_buffers()}
    prepared = accelerator.prepare(controlnet, optimizer, schedule)
    # DeepSpeed casts them to 16 bit, as it does weights, but has no exact copies of them.
    for name, buffer in controlnet.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    return prepared


def clip_gradients(accelerator: Accelerator, controlnet: Any, max_norm: float) -> Tensor:
    """Clip the gradients' norm over all processes, unless to 0, and return what it was, [].

    DeepSpeed has done so, and taken the step; it says what the norm was.
    """
    norm = accelerator.clip_grad_norm_(controlnet.parameters(), max_norm or math.inf)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=accelerator.device)


def whole_weights(accelerator: Accelerator, controlnet: Any) -> dict[str, Tensor]:
    """Return a network's whole state on the main process, in the precision that it is trained in.

    Every process must call this; what the others get is of no use.

    Args:
        accelerator: that prepared it.
        controlnet: as it was prepared.
    """
    network = accelerator.unwrap_model(controlnet)
    if way(accelerator) == "copies":
        return dict(network.state_dict())
    whole = _whole_of_zero if way(accelerator) == "deepspeed" else _whole_of_fsdp
    found = {}
    for name, part in (*network.named_parameters(), *network.named_buffers()):
        tensor = whole(part)
        if accelerator.is_main_process:
            found[name] = tensor.detach().cpu()
    return found


def _whole_of_fsdp(part: Tensor) -> Tensor:
    return part.full_tensor() if isinstance(part, DTensor) else part


def _whole_of_zero(part: Tensor) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if not isinstance(part, torch.nn.Parameter):
        return part
    if part.requires_grad:
        whole: Tensor = safe_get_full_fp32_param(part)
        return whole
    with GatheredParameters(part):
        return part.to(torch.float32, copy=True)


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """Return a tensor shared out over the processes as another one is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def forget_gathered(network: torch.nn.Module) -> None:
    """Have FSDP drop the whole weights that a forward pass gathered, and gather them anew.

    It keeps some for a backward pass, and has the network bear them in its own parts' place.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
