"""Training on several processes: what it supports, and what accelerate must be told."""

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SD3ControlNetModel
from torch.distributed.fsdp import MixedPrecisionPolicy

from common.errors import ConfigError
from train.config import TrainConfig
from train.models import WEIGHT_DTYPES, trained_parameters
from train.optim import fused_backward
from train.optim.named import ADAMW
from train.processes.strategy import STRATEGIES, Strategy, keeps_gradients, strategy

ZERO_STAGES = (2, 3)
SHARE_OUT: tuple[Strategy, ...] = ("fsdp", "deepspeed")  # the optimiser's state too

_OFFLOAD = (
    "accelerate's own configuration says what is offloaded with FSDP2 and DeepSpeed; leave it out, "
    "or train with DDP."
)
_BASE = (
    "blocks come and go on one device or with DDP; leave it out (--quantize-base int8 makes the "
    "base smaller too), or train with DDP."
)
_ZERO3 = (
    "with ZeRO-3 weights come and go within a block, so that no part of it can be stored; take "
    "--checkpointing controlnet or full."
)
_FSDP2 = "leave it out, or train with FSDP2 (configs/accelerate/fsdp2.yaml)."
# Strategy, option (with its value, unless any will do), reason.
UNSUPPORTED: tuple[tuple[Strategy, str, str], ...] = (
    ("fsdp", "--offload-optimizer", _OFFLOAD),
    ("fsdp", "--offload-activations", _OFFLOAD),
    ("fsdp", "--offload-base", _BASE),
    ("deepspeed", "--offload-optimizer", _OFFLOAD),
    ("deepspeed", "--offload-activations", _OFFLOAD),
    ("deepspeed", "--offload-base", _BASE),
    ("deepspeed", "--checkpointing selective", _ZERO3),
    ("deepspeed", "--ema-decay", f"DeepSpeed keeps the exact weights to itself; {_FSDP2}"),
    ("deepspeed", "--on-nonfinite skip", f"DeepSpeed cannot be held back; {_FSDP2}"),
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
            num_processes=accelerator.num_processes, scales_loss=accelerator.scaler is not None
        )
    if config.bf16_weights:
        if accelerator.num_processes > 1:
            raise ConfigError("--bf16-weights: each process would round in its own way; use one.")
        if accelerator.mixed_precision != "bf16":
            raise ConfigError("--bf16-weights: goes with --mixed-precision bf16.")
    for unsupported, option, reason in UNSUPPORTED:
        if strategy(accelerator) == unsupported and _is_given(config, option):
            raise ConfigError(f"{option}: {reason}")
    if strategy(accelerator) in SHARE_OUT and config.optimizer != ADAMW:
        raise ConfigError(
            f"--optimizer {config.optimizer}: only {ADAMW}'s state is shared out; take that, or "
            "train with DDP."
        )
    _check_plugin(accelerator)


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
        _shard_by_its_own_blocks(accelerator, controlnet)
    if keeps_gradients(accelerator):
        for parameter in trained_parameters(controlnet):
            parameter.grad = torch.zeros_like(parameter)
    if strategy(accelerator) != "deepspeed":
        with warnings.catch_warnings():
            # torch 2.13 has another name for it, which accelerate does not know yet.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            prepared: tuple[Any, Any, Any] = accelerator.prepare(controlnet, optimizer, schedule)
        # Without accelerate's autocast: the ControlNet casts its weights itself.
        vars(accelerator.unwrap_model(prepared[0])).pop("forward", None)
        return prepared
    _configure_deepspeed(accelerator.deepspeed_plugin.deepspeed_config, config)
    buffers = {name: buffer.clone() for name, buffer in controlnet.named_buffers()}
    prepared = accelerator.prepare(controlnet, optimizer, schedule)
    # DeepSpeed casts buffers to 16 bit, as it does weights, but keeps no exact copies of them.
    for name, buffer in controlnet.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    return prepared


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


def _shard_by_its_own_blocks(accelerator: Accelerator, controlnet: SD3ControlNetModel) -> None:
    """Replace the class of blocks that configs/accelerate/fsdp2.yaml names by the ControlNet's own.

    Stability's are of another class, and accelerate fails where it does not find what it is told.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap == ["JointTransformerBlock"]:
        own = type(controlnet.transformer_blocks[0]).__name__
        plugin.transformer_cls_names_to_wrap = [own]


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
