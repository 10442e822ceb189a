"""What is said of a learning rate that is not as its user may think."""

from pathlib import Path

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


def ends_in_warm_up(config: TrainConfig, num_steps: int) -> bool:
    """Return whether a run's warm-up is longer than the run."""
    return config.lr_scheduler != "constant" and config.lr_warmup_steps > num_steps


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
