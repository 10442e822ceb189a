"""Checkpoints: written aside and renamed, so that each is whole; pruned only after that.

checkpoint-500/
    train_state.json      written last: see `TrainState`
    run.json              settings and versions, for people
    controlnet/           as diffusers loads it
    controlnet_ema/       likewise, if an average is kept
    optimizer.bin, scheduler.bin, random_states_*.pkl, scaler.pt    accelerate's
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import SD3ControlNetModel
from safetensors import SafetensorError

from common.atomic_files import write_text
from common.command import os_error_line
from common.errors import ConfigError, RunError
from common.provenance import write_run
from sd3.pretrained import read_config
from train.distribution import Way, way, whole_weights
from train.optim.ema import Ema

STATE_FILE = "train_state.json"
CONTROLNET_FOLDER = "controlnet"
AVERAGE_FOLDER = "controlnet_ema"
PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        place: samples consumed; the next one's number in the run's order.
        seed: of the order and all draws.
        shuffle_window: of the order.
        bucket_group: of the order: how many samples in a row are of one bucket.
        fingerprints: of the data that the order refers to; see `Manifest.fingerprints`.
        averaged_steps: updates that the average of weights has taken in; 0 if there is none.
        distribution: how the processes shared the ControlNet and its optimiser's state.
        num_processes: that did.
    """

    step: int
    place: int
    seed: int
    shuffle_window: int | None
    bucket_group: int
    fingerprints: dict[str, str]
    averaged_steps: int = 0
    distribution: Way = "copies"
    num_processes: int = 1


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    complete = [path.parent for path in output_dir.glob(f"{PREFIX}*/{STATE_FILE}")]
    numbered = [path for path in complete if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(PREFIX)))


def choose(output_dir: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew.

    Raises:
        ConfigError: the named one is not there; or going on from it, or starting anew, would mix
            with later checkpoints that are there.
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
            later = [one.name for one in present if read_state(one).step > read_state(path).step]
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
    """Return where the run of a checkpoint stood.

    Raises:
        ConfigError: its state file is damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        return TrainState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); resume from an earlier one.") from error


def check_same_model(checkpoint: Path, controlnet: SD3ControlNetModel) -> None:
    """Hold the ControlNet of a checkpoint against the one that is to go on.

    Raises:
        ConfigError: they have other sizes.
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


def save(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainState,
    limit: int | None,
    average: Ema | None,
    config: Any,
) -> Path:
    """Save all that a resume needs; every process must call this.

    Args:
        accelerator: holds model, optimiser, schedule and scaler.
        output_dir: the run's folder.
        state: where the run stands.
        limit: checkpoints to keep, this one included.
        average: of the ControlNet's weights, or None.
        config: the run's settings, for people.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: it could not be written; earlier ones are as they were.
    """
    final = output_dir / f"{PREFIX}{state.step}"
    partial = output_dir / f"{final.name}.partial"
    main = accelerator.is_main_process
    state = replace(state, distribution=way(accelerator), num_processes=accelerator.num_processes)

    def begin() -> None:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        accelerator.save_state(str(partial))
        if average is not None:
            with average.in_place():
                _save_network(accelerator, average.network, partial / AVERAGE_FOLDER)

    def complete() -> None:
        if main:
            write_run(partial, "train", config)
            write_text(partial / STATE_FILE, json.dumps(asdict(state)) + "\n")
            _remove(final)
            partial.rename(final)
            for old in find(output_dir)[: -limit if limit else 0]:
                _remove(old)

    for part in (begin, write, complete):
        _together(accelerator, part, partial)
    return final


def _together(accelerator: Accelerator, part: Callable[[], None], partial: Path) -> None:
    """Do a part of saving on all processes, none of which goes on if it failed on any."""
    problem = ""
    try:
        part()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        problem = os_error_line(error) if isinstance(error, OSError) else str(error).splitlines()[0]
    problems = [one for one in gather_object([problem]) if one]
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


def restore_average(checkpoint: Path, average: Ema, num_steps: int) -> None:
    """Go on from a checkpoint's average; from its weights where it has none."""
    if (checkpoint / AVERAGE_FOLDER).is_dir():
        saved = SD3ControlNetModel.from_pretrained(checkpoint, subfolder=AVERAGE_FOLDER)
        average.restore(saved.state_dict(), num_steps)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint in such a way that no half of it passes for one."""
    if checkpoint.is_dir():
        gone = checkpoint.with_name(checkpoint.name + ".removed")
        shutil.rmtree(gone, ignore_errors=True)
        checkpoint.rename(gone)
        shutil.rmtree(gone)


def use_diffusers_format(accelerator: Accelerator) -> None:
    """Have checkpoints hold the ControlNet as a folder that diffusers loads."""

    def save_model(models: list[Any], weights: list[Any], folder: str) -> None:
        for model in models:
            _save_network(accelerator, model, Path(folder) / CONTROLNET_FOLDER)
        weights.clear()

    def load_model(models: list[Any], folder: str) -> None:
        while models:
            unwrapped = accelerator.unwrap_model(models.pop())
            saved = SD3ControlNetModel.from_pretrained(folder, subfolder=CONTROLNET_FOLDER)
            unwrapped.load_state_dict(saved.state_dict())

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def save_result(
    accelerator: Accelerator, controlnet: Any, average: Ema | None, output_dir: Path
) -> None:
    """Save the trained ControlNet into the run's folder, and its average into one in there.

    Every process must call this.
    """
    _replace_network(accelerator, controlnet, output_dir)
    if average is not None:
        with average.in_place():
            _replace_network(accelerator, controlnet, output_dir / AVERAGE_FOLDER)


def _replace_network(accelerator: Accelerator, controlnet: Any, folder: Path) -> None:
    """Save a network as `_save_network` does, but each file whole."""
    partial = folder / "controlnet.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    _save_network(accelerator, controlnet, partial)
    if not accelerator.is_main_process:
        return
    # The configuration goes first and comes last: without it the folder is no model.
    for stale in (folder / "config.json", *folder.glob("diffusion_pytorch_model*")):
        stale.unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(folder / file.name)
    partial.rmdir()


def _save_network(accelerator: Accelerator, controlnet: Any, folder: Path) -> None:
    """Save a ControlNet with all of its weights, however it is shared out, as diffusers does.

    Every process must call this.
    """
    weights = whole_weights(accelerator, controlnet)
    if not accelerator.is_main_process:
        return
    config = accelerator.unwrap_model(controlnet).config
    with torch.device("meta"):
        network = SD3ControlNetModel.from_config(config)
    network.load_state_dict(weights, assign=True)
    network.save_pretrained(str(folder))
