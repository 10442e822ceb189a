"""What the figures of a run say that its user should know, if they do."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from train.watch.curves import AVERAGED_HELD_OUT, HELD_OUT, mean

ENOUGH = 5  # validations before anything is said
MOVED = 0.995  # a held-out loss below so much of its baseline has moved
RECOVERING = 0.97  # and so has one that is below so much of its highest
RISING = 3  # validations in a row, each above the one before
RISEN = 1.02  # of the lowest


def advice(
    held_out: Mapping[int, Mapping[str, Sequence[float]]], losses: Sequence[tuple[int, float]]
) -> dict[str, str]:
    """Return lines of advice by their kind, none while the figures give no reason.

    Args:
        held_out: losses by name and noise level, by step; step 0 is the baseline.
        losses: of training, (step, mean since the one before), by step.
    """
    steps = sorted(held_out)
    # Of the weights and their average; in a mix of sets each set has its own beside these.
    measured = {
        step: [losses[name] for name in (HELD_OUT, AVERAGED_HELD_OUT) if name in losses]
        for step, losses in sorted(held_out.items())
    }
    lowest = {step: min(map(mean, each)) for step, each in measured.items()}
    lines = {}
    if 0 in lowest and len(steps) > ENOUGH:
        # Some noise levels get worse where training looks away, so one that falls is enough.
        moved = any(
            value < MOVED * before
            for step in steps[1:]
            for levels in measured[step]
            for value, before in zip(levels, measured[0][0], strict=True)
        )
        # High learning rates first make it worse than nothing, for a while.
        recovering = lowest[steps[-1]] < RECOVERING * max(lowest.values())
        if not moved and not recovering:
            lines["unmoved"] = (
                f"the held-out loss is not below that of step 0 at any noise level after "
                f"{len(steps) - 1} validations: the ControlNet has learned nothing that shows. "
                "Look whether pictures and conditioning images belong together (python -m shards "
                "preview), or give a higher --learning-rate."
            )
    best = min(lowest, key=lambda step: lowest[step], default=0)
    after = [step for step in steps if step >= best]
    last = [lowest[step] for step in after][-RISING - 1 :]
    rises = len(last) > RISING and all(a < b for a, b in pairwise(last))
    if rises and best > 0 and last[-1] > RISEN * lowest[best] and _falls(losses, best):
        lines["by heart"] = (
            f"the held-out loss has risen since step {best} while the training loss fell: the "
            "ControlNet begins to learn its samples by heart. --keep-best keeps the lowest; more "
            "samples or fewer steps help."
        )
    return lines


def _falls(losses: Sequence[tuple[int, float]], since: int) -> bool:
    """Return whether the second half of the losses since a step is below those of before."""
    before = [loss for step, loss in losses if since / 2 < step <= since]
    later = [loss for step, loss in losses if step > since]
    later = later[len(later) // 2 :]
    return bool(before and later) and mean(later) < mean(before)
