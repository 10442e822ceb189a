"""The learning rate: its peak, its schedule, and what is said of one that may surprise its user."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.optimization import get_scheduler

from common.options import flag
from common.provenance import read_settings
from train.config import TrainConfig

# What the rate at a step depends on.
OPTIONS = (
    "learning_rate",
    "scale_lr",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "max_train_steps",
    "num_train_epochs",
)


def peak_learning_rate(config: TrainConfig, step_samples: int) -> float:
    """Return the learning rate, multiplied by the samples a step if the settings ask for that."""
    return config.learning_rate * (step_samples if config.scale_lr else 1)


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


def ends_in_warm_up(config: TrainConfig, num_steps: int) -> bool:
    """Return whether a run's warm-up is longer than the run."""
    return config.lr_scheduler != "constant" and config.lr_warmup_steps > num_steps


def remarks(config: TrainConfig, num_steps: int) -> Iterator[str]:
    """Yield sentences about a run's learning rate that may not be what its user wants."""
    if ends_in_warm_up(config, num_steps):
        yield (
            f"--lr-warmup-steps {config.lr_warmup_steps} is more than the run's {num_steps} steps, "
            "so the learning rate never comes to --learning-rate; give less"
        )
    if config.optimizer == "prodigy" and (config.learning_rate != 1 or config.scale_lr):
        given = f"--learning-rate {config.learning_rate:g}{' --scale-lr' * config.scale_lr}"
        yield f"{given}: prodigy finds the rate by itself, and multiplies it by this; give 1"


def describe_change(config: TrainConfig, checkpoint: Path, was: float, now: float) -> str:
    """Return a sentence about a learning rate that changes at a checkpoint, and why.

    Args:
        config: of the run that goes on.
        checkpoint: its folder; the settings that wrote it are in its run.json.
        was: the rate that the next step would have had.
        now: the rate that it has.
    """
    changed = [
        f"{flag(name)} was {_shown(before)} and is {_shown(getattr(config, name))}"
        for name, before in read_settings(checkpoint).items()
        if name in OPTIONS and before != getattr(config, name)
    ]
    reason = ", ".join(changed) or "the number of samples per step changed"
    return f"{checkpoint.name}: the learning rate was {was:.3g} and is {now:.3g}, because {reason}"


def _shown(value: object) -> object:
    return "not given" if value is None else value
