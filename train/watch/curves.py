"""The names of a run's curves, the same in every tracker."""

from collections.abc import Sequence

NUM_LEVELS = 8  # noise levels that losses are told apart by

LOSS = "loss"
LEARNING_RATE = "lr"
EPOCH = "epoch"
GRADIENT_NORM = "gradient_norm"
RATE = "samples_per_second"
DEVICE_MEMORY = "device_memory_gb"
STEPS_LEFT_OUT = "steps_left_out"
HELD_OUT = "held_out_loss"
AVERAGED_HELD_OUT = "ema_held_out_loss"
BASE_HELD_OUT = "base_held_out_loss"  # without a ControlNet


def mean(levels: Sequence[float]) -> float:
    """Return a loss, which is the mean over its noise levels."""
    return sum(levels) / len(levels)


def of_set(name: str, set_name: str) -> str:
    """Return the name of a loss's curve of one of several training sets."""
    return f"{name}/{set_name}"


def in_words(name: str) -> str:
    """Return what a curve is called in a sentence."""
    return name.replace("_", " ").replace("/", " of ")


def of_level(name: str, level: int) -> str:
    """Return the name of a loss's curve at one noise level.

    Args:
        name: of the loss.
        level: 0 to NUM_LEVELS - 1: the held-out loss is measured at level / NUM_LEVELS; the
            training loss is that of the samples from there to the next level.
    """
    return f"{name}/level-{level}"
