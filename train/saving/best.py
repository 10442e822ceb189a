"""The ControlNet of the lowest held-out loss, in `best/` beside the last one (--keep-best).

best/                 as diffusers loads it: the weights, or their average if that is better
best/best.json        its step, loss and which of the two it is
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.atomic_files import write_text
from train.assembly import Run
from train.processes.agreement import main_decides
from train.saving.controlnet import replace_controlnet
from train.watch.curves import AVERAGED_HELD_OUT, HELD_OUT, mean

BEST_FOLDER = "best"
BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """What is kept.

    Attributes:
        step: of its validation.
        held_out_loss: mean over the noise levels.
        averaged: whether it is the moving average of the weights.
    """

    step: int
    held_out_loss: float
    averaged: bool


def keep_best(run: Run, step: int, losses: Mapping[str, Sequence[float]]) -> None:
    """Keep the ControlNet if its held-out loss is the lowest so far.

    Every process must call this after each validation, with the same losses.

    Args:
        run: with `--keep-best`; without, nothing is done.
        step: of the validation. Step 0 begins a run and drops what an earlier one kept.
        losses: by name and noise level.

    Raises:
        RunError: a weight is not finite.
        OSError: it cannot be written; raised on all processes.
    """
    if not run.config.keep_best or not losses:
        return
    folder = run.config.output_dir / BEST_FOLDER
    if step == 0:
        main_decides(lambda: shutil.rmtree(folder, ignore_errors=True))
        return
    found = lowest(step, losses)
    kept = main_decides(lambda: read_best(run.config.output_dir))
    # One of a later step is of a run that this one does not go on from.
    if kept and kept.step < step and kept.held_out_loss <= found.held_out_loss:
        return
    main_decides(lambda: (folder / BEST_FILE).unlink(missing_ok=True))
    replace_controlnet(run.accelerator, run.controlnet, folder, run.ema if found.averaged else None)
    main_decides(lambda: write_text(folder / BEST_FILE, json.dumps(asdict(found)) + "\n"))


def lowest(step: int, losses: Mapping[str, Sequence[float]]) -> Best:
    """Return the better of the weights and their average, by the mean over the noise levels."""
    # A mix of sets has each set's own losses beside these.
    names = [name for name in (HELD_OUT, AVERAGED_HELD_OUT) if name in losses]
    means = {name: mean(losses[name]) for name in names}
    name = min(means, key=lambda each: means[each])
    return Best(step, means[name], name == AVERAGED_HELD_OUT)


def read_best(output_dir: Path) -> Best | None:
    """Return what is kept in a run's folder; None if nothing is, or not all of it."""
    try:
        return Best(**json.loads((output_dir / BEST_FOLDER / BEST_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
