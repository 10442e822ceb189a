"""How several processes share the work: copies of the ControlNet (DDP), FSDP2, or DeepSpeed ZeRO.

accelerate shards the ControlNet's weights, gradients and optimiser state as its configuration says
(see configs/accelerate/). The frozen transformer is whole on every device. This module holds what
the rest of training needs to know about it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers import SD3ControlNetModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from common.errors import ConfigError, RunError, ShardError
from train.config import TrainConfig
from train.models import WEIGHT_DTYPES, trained_parameters
from train.optim import fused_backward

Decision = TypeVar("Decision")
Strategy = Literal["copies", "fsdp", "deepspeed"]
STRATEGIES: dict[DistributedType, Strategy] = {
    DistributedType.NO: "copies",
    DistributedType.MULTI_CPU: "copies",
    DistributedType.MULTI_GPU: "copies",
    DistributedType.FSDP: "fsdp",
    DistributedType.DEEPSPEED: "deepspeed",
}
STRATEGY_NAMES: dict[Strategy, str] = {
    "copies": "one process or DDP",
    "fsdp": "FSDP2",
    "deepspeed": "DeepSpeed",
}
ZERO_STAGES = (2, 3)
FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0

_OFFLOAD = (
    "accelerate's own configuration says what is offloaded with FSDP2 and DeepSpeed; leave it out, "
    "or train with DDP."
)
_8BIT = "its state cannot be shared out; leave it out, or train with DDP."
_FSDP2 = "leave it out, or train with FSDP2 (configs/accelerate/fsdp2.yaml)."
# Strategy, option (with its value, unless any will do), reason.
UNSUPPORTED: tuple[tuple[Strategy, str, str], ...] = (
    ("fsdp", "--offload-optimizer", _OFFLOAD),
    ("fsdp", "--offload-activations", _OFFLOAD),
    ("fsdp", "--use-8bit-adam", _8BIT),
    ("deepspeed", "--offload-optimizer", _OFFLOAD),
    ("deepspeed", "--offload-activations", _OFFLOAD),
    ("deepspeed", "--use-8bit-adam", _8BIT),
    ("deepspeed", "--ema-decay", f"DeepSpeed keeps the exact weights to itself; {_FSDP2}"),
    ("deepspeed", "--on-nonfinite skip", f"DeepSpeed cannot be held back; {_FSDP2}"),
)


def strategy(accelerator: Accelerator) -> Strategy:
    """Return how the processes share the ControlNet."""
    return STRATEGIES[accelerator.distributed_type]


def main_decides(decide: Callable[[], Decision]) -> Decision:
    """Return what a function returns on the main process; every process must call this.

    Processes that look at a shared disk each for themselves may see different files.

    Args:
        decide: called on the main process only; its result must be picklable.

    Raises:
        ConfigError, ShardError, RunError, OSError: on all processes, as `decide` raised it.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = decide()
        except (ConfigError, ShardError, RunError, OSError) as error:
            outcome[1] = error
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise problem
    decision: Decision = result
    return decision


def local_main_first(find: Callable[[], Decision]) -> Decision:
    """Return what a function finds, on each machine's first process before the others.

    Every process must call this. What the first one downloads, the others then find.
    """
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        return find()
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def check_same_everywhere(found: Mapping[str, str]) -> None:
    """Check that all processes found the same; every process must call this.

    Args:
        found: name or digest of what was found, by option.

    Raises:
        ConfigError: two differ; raised on all processes.
    """
    everywhere = gather_object([dict(found)])
    for option, value in everywhere[0].items():
        for rank, others in enumerate(everywhere):
            if others[option] != value:
                raise ConfigError(
                    f"{option}: process 0 found {value}, process {rank} {others[option]}. It was "
                    "changed meanwhile, or a network disk still shows an older one: run again."
                )


def check(accelerator: Accelerator, config: TrainConfig) -> None:
    """Refuse strategies that training does not support, and options that do not go with them.

    Raises:
        ConfigError: naming the strategy or the option.
    """
    if accelerator.distributed_type not in STRATEGIES:
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
            scales_loss=accelerator.scaler is not None,
        )
    if config.fp8_matmul:
        _check_fp8(accelerator.device)
    if config.bf16_weights:
        if accelerator.num_processes > 1:
            raise ConfigError("--bf16-weights: each process would round in its own way; use one.")
        if accelerator.mixed_precision != "bf16":
            raise ConfigError("--bf16-weights: goes with --mixed-precision bf16.")
    for unsupported, option, reason in UNSUPPORTED:
        if strategy(accelerator) == unsupported and _is_given(config, option):
            raise ConfigError(f"{option}: {reason}")
    _check_plugin(accelerator)


def _check_fp8(device: torch.device) -> None:
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            f"--fp8-matmul: {torch.cuda.get_device_name(device)} has none (compute capability "
            f"{'.'.join(map(str, capability))}, {'.'.join(map(str, FP8_CAPABILITY))} is "
            "needed); leave it out, --quantize-base fp8 works without."
        )


def _is_given(config: TrainConfig, option: str) -> bool:
    """Return whether an option, as written on a command line, is among the settings."""
    flag, _, value = option.partition(" ")
    setting = getattr(config, flag.removeprefix("--").replace("-", "_"))
    return setting == value if value else setting not in (None, False)


def _check_plugin(accelerator: Accelerator) -> None:
    """Refuse versions of FSDP and stages of ZeRO that training does not support."""
    if strategy(accelerator) == "fsdp" and not accelerator.is_fsdp2:
        raise ConfigError(
            "accelerate is set up for the first FSDP: its configuration needs fsdp_version: 2, "
            "as in configs/accelerate/fsdp2.yaml."
        )
    if strategy(accelerator) == "deepspeed":
        stage = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"]
        if stage not in ZERO_STAGES:
            raise ConfigError(
                f"accelerate is set up for ZeRO stage {stage}: use 2 or 3, as in "
                "configs/accelerate/, or DDP."
            )


def prepare(
    accelerator: Accelerator,
    config: TrainConfig,
    controlnet: SD3ControlNetModel,
    optimizer: Any,
    schedule: Any,
) -> tuple[Any, Any, Any]:
    """Return ControlNet, optimiser and schedule as accelerate prepares them."""
    if strategy(accelerator) == "fsdp":
        _set_fsdp_precision(accelerator)
    if keeps_gradients(accelerator):
        for parameter in trained_parameters(controlnet):
            parameter.grad = torch.zeros_like(parameter)
    if strategy(accelerator) != "deepspeed":
        prepared: tuple[Any, Any, Any] = accelerator.prepare(controlnet, optimizer, schedule)
        return prepared
    _configure_deepspeed(accelerator.deepspeed_plugin.deepspeed_config, config)
    buffers = {name: buffer.clone() for name, buffer in controlnet.named_buffers()}
    prepared = accelerator.prepare(controlnet, optimizer, schedule)
    # DeepSpeed casts buffers to 16 bit, as it does weights, but keeps no exact copies of them.
    for name, buffer in controlnet.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    return prepared


def keeps_gradients(accelerator: Accelerator) -> bool:
    """Return whether gradients are set to zero between steps instead of being freed.

    DDP's gradients are views of the memory that it sends. If they were freed, the batches that are
    accumulated before anything is sent would get gradients of their own beside that memory.
    """
    ddp = strategy(accelerator) == "copies" and accelerator.num_processes > 1
    return ddp and accelerator.gradient_accumulation_steps > 1


def _set_fsdp_precision(accelerator: Accelerator) -> None:
    """Compute in 16 bit, but add gradients up in float32 and cast no inputs.

    accelerate's own policy would add in 16 bit, and hand the ControlNet its timesteps rounded: in
    bfloat16 they are 4 apart above 512, so it would see other noise levels than the base.
    """
    if accelerator.mixed_precision != "no":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=WEIGHT_DTYPES[accelerator.mixed_precision],
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def _configure_deepspeed(settings: dict[str, Any], config: TrainConfig) -> None:
    """Enter options of training into DeepSpeed's settings, and the precision of gradients.

    What the user's own file says of that precision is kept.
    """
    settings |= {
        "train_micro_batch_size_per_gpu": config.train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }
    settings.setdefault("communication_data_type", "fp32")
    settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # accelerate sets this for fp16. It would round the timesteps.
    settings.get("fp16", {}).pop("auto_cast", None)


def clip_gradients(accelerator: Accelerator, controlnet: Any, max_norm: float) -> Tensor:
    """Clip the gradients' norm over all processes and return what it was, [].

    Args:
        accelerator: prepared the ControlNet. DeepSpeed clips by itself, and has taken the
            optimiser's step by now; here it only returns the norm.
        controlnet: as accelerate prepared it.
        max_norm: largest norm; 0 does not clip.
    """
    norm = accelerator.clip_grad_norm_(controlnet.parameters(), max_norm or math.inf)
    if strategy(accelerator) == "deepspeed" and accelerator.optimizer_step_was_skipped:
        norm = math.inf  # what was returned is the norm of an earlier step
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=accelerator.device)


def full_state_dict(
    accelerator: Accelerator, controlnet: Any, instead: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return all weights of a network that accelerate prepared, in the precision of training.

    Every process must call this, but only the main process may use the result.

    Args:
        accelerator: prepared the network.
        controlnet: the network.
        instead: takes the place of some of its weights, by name, sharded as they are.
    """
    network, instead = accelerator.unwrap_model(controlnet), instead or {}
    if strategy(accelerator) == "copies":
        return {**network.state_dict(), **instead}
    gather = _gather_zero if strategy(accelerator) == "deepspeed" else _gather_fsdp
    weights = {}
    for name, shard in (*network.named_parameters(), *network.named_buffers()):
        tensor = gather(instead.get(name, shard))
        if accelerator.is_main_process:
            weights[name] = tensor.detach().cpu()
    return weights


def _gather_fsdp(shard: Tensor) -> Tensor:
    return shard.full_tensor() if isinstance(shard, DTensor) else shard


def _gather_zero(shard: Tensor) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if not isinstance(shard, torch.nn.Parameter):
        return shard
    if shard.requires_grad:
        tensor: Tensor = safe_get_full_fp32_param(shard)
        return tensor
    with GatheredParameters(shard):
        return shard.to(torch.float32, copy=True)


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded over the processes as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def reshard(network: torch.nn.Module) -> None:
    """Make FSDP drop the weights it gathered for a forward pass, so that it gathers them anew.

    It keeps some of them for a backward pass, and meanwhile the network's parameters are these
    copies instead of its own shards.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
