"""AdamW, its learning rate, and how much memory its state takes."""

from typing import Any

import torch
from diffusers.optimization import get_scheduler

from train.config import TrainConfig
from train.optim.offloaded_state import OffloadedState
from train.optim.stochastic_rounding import StochasticRounding

# bitsandbytes keeps the moments of smaller weights in float32, and larger ones with a float32
# scale for each block.
MIN_8BIT_NUMBERS, NUMBERS_PER_8BIT_BLOCK = 4096, 256


def peak_learning_rate(config: TrainConfig, step_samples: int) -> float:
    """Return the learning rate, multiplied by the samples a step if the settings ask for that."""
    return config.learning_rate * (step_samples if config.scale_lr else 1)


def make_optimizer(config: TrainConfig, parameters: list[Any], step_samples: int) -> Any:
    """Return AdamW over some parameters; a step takes `step_samples` on all processes."""
    adamw: Any = torch.optim.AdamW
    options: dict[str, Any] = {"fused": True}
    if config.use_8bit_adam:
        import bitsandbytes

        adamw, options = bitsandbytes.optim.AdamW8bit, {}
    # Rounding wraps offloading: its temporaries come after the state has begun to leave.
    extensions: list[type[Any]] = []
    if config.bf16_weights:
        extensions.append(StochasticRounding)
    if config.offload_optimizer:
        extensions.append(OffloadedState)
    if extensions:
        name = "".join(part.__name__ for part in (*extensions, adamw))
        adamw = type(name, (*extensions, adamw), {})
    return adamw(
        parameters,
        lr=peak_learning_rate(config, step_samples),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **options,
    )


def state_bytes(config: TrainConfig, count: int) -> int:
    """Return the size of AdamW's two moments for a weight of `count` numbers, in bytes."""
    if not config.use_8bit_adam or count < MIN_8BIT_NUMBERS:
        return 8 * count
    return 2 * (count + 4 * -(-count // NUMBERS_PER_8BIT_BLOCK))


def make_schedule(config: TrainConfig, optimizer: Any, num_steps: int) -> Any:
    """Return diffusers' learning rate schedule."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def set_learning_rate(schedule: Any, learning_rate: float) -> tuple[float, float]:
    """Give a schedule that was restored from a checkpoint the current peak learning rate.

    Returns:
        The rate of the next step as restored, and as it is now.
    """
    restored = schedule.optimizer.param_groups[0]["lr"]
    schedule.base_lrs = [learning_rate] * len(schedule.base_lrs)
    for group, factor in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] = learning_rate * factor(schedule.last_epoch)
    return restored, schedule.optimizer.param_groups[0]["lr"]
