"""Checkpoints: written aside and renamed, so that each is whole; pruned only after that."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import SD3ControlNetModel

from shards.errors import ConfigError
from shards.pretrained import read_config
from shards.writer import write_text

STATE_FILE = "train_state.json"
CONTROLNET_FOLDER = "controlnet"
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
    """

    step: int
    place: int
    seed: int
    shuffle_window: int | None
    bucket_group: int
    fingerprints: dict[str, str]


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


def save(accelerator: Accelerator, output_dir: Path, state: TrainState, limit: int | None) -> Path:
    """Save all that a resume needs; every process must call this.

    Args:
        accelerator: holds model, optimiser, schedule and scaler.
        output_dir: the run's folder.
        state: where the run stands.
        limit: checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.
    """
    final = output_dir / f"{PREFIX}{state.step}"
    partial = output_dir / f"{final.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text(partial / STATE_FILE, json.dumps(asdict(state)) + "\n")
        _remove(final)
        partial.rename(final)
        for old in find(output_dir)[: -limit if limit else 0]:
            _remove(old)
    accelerator.wait_for_everyone()
    return final


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
        if accelerator.is_main_process:
            for model in models:
                unwrapped = accelerator.unwrap_model(model)
                unwrapped.save_pretrained(str(Path(folder) / CONTROLNET_FOLDER))
        weights.clear()

    def load_model(models: list[Any], folder: str) -> None:
        while models:
            unwrapped = accelerator.unwrap_model(models.pop())
            saved = SD3ControlNetModel.from_pretrained(folder, subfolder=CONTROLNET_FOLDER)
            unwrapped.load_state_dict(saved.state_dict())

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def save_controlnet(controlnet: SD3ControlNetModel, output_dir: Path) -> None:
    """Save the trained ControlNet into the run's folder, as diffusers does, each file whole."""
    partial = output_dir / "controlnet.partial"
    shutil.rmtree(partial, ignore_errors=True)
    controlnet.save_pretrained(str(partial))
    # The configuration goes first and comes last: without it the folder is no model.
    for stale in (output_dir / "config.json", *output_dir.glob("diffusion_pytorch_model*")):
        stale.unlink(missing_ok=True)
    for file in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(output_dir / file.name)
    partial.rmdir()
