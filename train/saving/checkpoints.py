"""Checkpoints: written to a temporary folder and renamed, so that each is complete.

checkpoint-500/
    train_state.json      written last: see `TrainState`
    run.json              settings and versions, for people
    controlnet/           as diffusers loads it
    controlnet_ema/       the averaged weights in the same form, if there are any
    optimizer.bin, scheduler.bin, random_states_*.pkl, scaler.pt    accelerate's
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SD3ControlNetModel
from safetensors import SafetensorError

from common.atomic_files import write_text
from common.errors import ConfigError, RunError, os_error_line
from common.provenance import write_run
from sd3.pretrained import read_config
from train.config import TrainConfig
from train.distribution import Strategy, strategy
from train.optim.ema import Ema
from train.saving.controlnet import CONTROLNET_FOLDER, EMA_FOLDER, save_controlnet

STATE_FILE = "train_state.json"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        place: the next sample's number in the run's order; also the number of samples consumed.
        seed: of the order and all draws.
        shuffle_window: shards mixed at a time; None for all.
        bucket_group: how many consecutive samples of the order belong to one bucket.
        fingerprints: of the data that the order refers to; see `Manifest.fingerprints`.
        averaged_steps: updates in the moving average of the weights; 0 without one.
        distribution: how the processes shared the ControlNet and its optimiser's state.
        num_processes: how many processes there were.
    """

    step: int
    place: int
    seed: int
    shuffle_window: int | None
    bucket_group: int
    fingerprints: dict[str, str]
    averaged_steps: int = 0
    distribution: Strategy = "copies"
    num_processes: int = 1


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    complete = [path.parent for path in output_dir.glob(f"{PREFIX}*/{STATE_FILE}")]
    numbered = [path for path in complete if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(PREFIX)))


def choose(output_dir: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's name or path, `latest`, or None.

    Raises:
        ConfigError: the wanted checkpoint does not exist, or the run would mix with later
            checkpoints in the folder.
    """
    present = find(output_dir)
    if wanted == "latest":
        return present[-1] if present else None
    if wanted is None:
        if present:
            raise ConfigError(
                f"--output-dir {output_dir} holds {present[-1].name} of an earlier run: go on with "
                "--resume-from-checkpoint latest, or give another folder, or remove them."
            )
        return None
    for path in (Path(wanted), output_dir / Path(wanted).name):
        if (path / STATE_FILE).is_file():
            step = read_state(path).step
            later = [other.name for other in present if read_state(other).step > step]
            if later:
                raise ConfigError(
                    f"--resume-from-checkpoint {wanted}: {output_dir} holds later ones, "
                    f"{', '.join(later)}; move them away, or give another --output-dir."
                )
            return path
    names = ", ".join(path.name for path in present) or "none"
    raise ConfigError(
        f"--resume-from-checkpoint {wanted}: no complete checkpoint; {output_dir} has {names}."
    )


def read_state(checkpoint: Path) -> TrainState:
    """Return where a run stood when it saved a checkpoint.

    Raises:
        ConfigError: its state file is damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); resume from an earlier one.") from error


def check_same_model(checkpoint: Path, controlnet: SD3ControlNetModel) -> None:
    """Check that a checkpoint holds a ControlNet of the same sizes as the one to train.

    Raises:
        ConfigError: it does not.
    """
    saved = read_config(checkpoint, CONTROLNET_FOLDER)
    wrong = [
        f"{name}: checkpoint {saved[name]}, now {now}"
        for name, now in controlnet.config.items()
        if not name.startswith("_") and name in saved and json.dumps(saved[name]) != json.dumps(now)
    ]
    if wrong:
        raise ConfigError(
            f"{checkpoint}: holds a ControlNet of another shape ({'; '.join(wrong)}). Resume with "
            "the same --num-controlnet-layers and base model, or start in another --output-dir."
        )


def save(accelerator: Accelerator, config: TrainConfig, state: TrainState, ema: Ema | None) -> Path:
    """Save all that a resume needs, then remove old checkpoints; every process must call this.

    Args:
        accelerator: holds ControlNet, optimiser, schedule and scaler.
        config: settings of the run.
        state: where the run stands.
        ema: the average of the ControlNet's weights, or None.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: it could not be written; earlier ones are unchanged.
    """
    final = config.output_dir / f"{PREFIX}{state.step}"
    partial = final.with_name(f"{final.name}.partial")
    state = replace(
        state,
        averaged_steps=ema.num_steps if ema else 0,
        distribution=strategy(accelerator),
        num_processes=accelerator.num_processes,
    )

    def begin() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        accelerator.save_state(str(partial))
        if ema is not None:
            save_controlnet(accelerator, ema.network, partial / EMA_FOLDER, ema)

    def complete() -> None:
        if accelerator.is_main_process:
            write_run(partial, "train", config)
            write_text(partial / STATE_FILE, json.dumps(asdict(state)) + "\n")
            _remove(final)
            partial.rename(final)
            _remove_old(config.output_dir, config.checkpoints_total_limit)

    for phase in (begin, write, complete):
        _run_on_all(accelerator, phase, partial)
    return final


def _run_on_all(accelerator: Accelerator, phase: Callable[[], None], partial: Path) -> None:
    """Run a phase of saving on all processes; if it fails on any, all of them raise.

    Raises:
        RunError: it failed on at least one process.
    """
    problem = ""
    try:
        phase()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        problem = os_error_line(error) if isinstance(error, OSError) else str(error).splitlines()[0]
    problems = [text for text in gather_object([problem]) if text]
    if not problems:
        return
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    kept = find(partial.parent)
    earlier = f"{kept[-1].name} is kept" if kept else "there is no earlier one"
    raise RunError(
        f"{partial.with_suffix('')} could not be written ({problems[0]}); {earlier}. Make room, or "
        "give --checkpoints-total-limit, and go on with --resume-from-checkpoint latest."
    )


def _remove_old(output_dir: Path, limit: int | None) -> None:
    """Remove all complete checkpoints but the last `limit`; None keeps them all."""
    for old in find(output_dir)[: -limit if limit else 0]:
        _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that an interruption leaves no half of it under its name."""
    if checkpoint.is_dir():
        removed = checkpoint.with_name(checkpoint.name + ".removed")
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed)
