"""Which checkpoint a run goes on from: the newest that is whole, or the one that is named."""

import json
import math
import pickle
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from accelerate.utils import OPTIMIZER_NAME
from diffusers import SD3ControlNetModel
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import ConfigError, os_error_line
from common.memory.exhausted import is_out_of_memory
from common.options import as_dict, flag
from common.provenance import read_settings
from sd3.finite import nonfinite_weight_in
from sd3.pretrained import read_config
from train.config import TrainConfig
from train.optim.named import ADAMS, ADAMW, ADAMW_8BIT
from train.optim.per_weight import flat_state
from train.saving.checkpoints import (
    STATE_FILE,
    TrainState,
    find,
    find_all,
    parse_state,
    read_state,
    recorded_step,
)
from train.saving.controlnet import CONTROLNET_FOLDER, EMA_FOLDER
from train.saving.digests import find_change, find_cut
from train.saving.write_state import first_failure

# Options that say what the base is. A folder may have moved, so this is worth a line, no more.
OF_THE_BASE = (
    "pretrained_model_name_or_path",
    "revision",
    "single_file_config",
    "transformer",
    "lora",
    "lora_scale",
)
# Options that an optimiser's state remembers.
OF_THE_OPTIMIZER = (
    "optimizer",
    "optimizer_args",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
)
WAY_OUT = "resume from an earlier one; --resume-from-checkpoint latest takes the newest whole one."


def choose(output_dir: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Its files are read and held against their digests. Call this on one process only, or several
    may choose differently.

    Args:
        output_dir: the run's folder.
        wanted: a checkpoint's name or path, `latest`, or None.

    Raises:
        ConfigError: the wanted checkpoint does not exist or is damaged, no checkpoint is whole, or
            the run would mix with later checkpoints in the folder.
    """
    if wanted not in (None, "latest"):
        return _named(output_dir, find(output_dir), wanted)
    present = find_all(output_dir)
    if wanted == "latest":
        return _newest_whole(present)
    if present:
        raise ConfigError(
            f"--output-dir {output_dir} holds {present[-1].name} of an earlier run: go on with "
            "--resume-from-checkpoint latest, or give another folder, or remove them."
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is damaged, and how, in one line; None if it is whole.

    Raises:
        OSError: a file cannot be read now, as where a network disk does not answer.
    """
    if not (checkpoint / STATE_FILE).is_file():
        return f"{checkpoint / STATE_FILE}: is missing"
    try:
        files = parse_state(checkpoint).files
    except ValueError as error:
        return f"{checkpoint / STATE_FILE}: damaged ({error})"
    if problem := find_change(checkpoint, files) if files else find_cut(checkpoint):
        return problem
    for name in (CONTROLNET_FOLDER, EMA_FOLDER):
        if found := nonfinite_weight_in(checkpoint / name):
            path, weight = found
            return f"{path}: the weight {weight} is not finite"
    return None


def restore(accelerator: Accelerator, checkpoint: Path, *, optimizer_on_host: bool = False) -> None:
    """Load a checkpoint into what accelerate prepared; every process must call this.

    Args:
        accelerator: prepared what is loaded.
        checkpoint: its folder.
        optimizer_on_host: read the optimiser's state into host memory. Among several processes
            accelerate would read all of it into the device's first.

    Raises:
        ConfigError: it cannot be loaded.
    """
    options = {"map_location": "cpu"} if optimizer_on_host else {}
    try:
        accelerator.load_state(str(checkpoint), **options)
    except (
        *(EOFError, OSError, RuntimeError, ValueError, KeyError, pickle.PickleError),
        CheckpointException,
    ) as error:
        failure = first_failure(error) if isinstance(error, CheckpointException) else error
        if is_out_of_memory(failure):
            raise failure from None
        reason = (str(failure) or type(failure).__name__).splitlines()[0]
        raise ConfigError(
            f"{checkpoint}: cannot be loaded ({reason}). Move it away, and "
            "--resume-from-checkpoint latest takes the one before."
        ) from error


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
            "the same --num-controlnet-layers, --controlnet-kind and base model, or start in "
            "another --output-dir."
        )


def check_same_optimizer(checkpoint: Path, config: TrainConfig) -> None:
    """Check that a checkpoint holds the state of a run's optimiser, with the same arguments.

    Optimisers load the state of each other, and fail at the next step or go on with what they do
    not know. Their arguments come with their state, so that others would have no effect.

    Raises:
        ConfigError: it holds another's, or has other arguments.
    """
    before, now = read_settings(checkpoint), as_dict(config)
    if "use_8bit_adam" in before:  # as it was called in earlier versions
        before = {"optimizer": ADAMW_8BIT if before["use_8bit_adam"] else ADAMW} | before
    held = _is_8bit(checkpoint / f"{OPTIMIZER_NAME}.bin")
    if held is not None and {before.get("optimizer", ADAMW), config.optimizer} <= set(ADAMS):
        before |= {"optimizer": ADAMW_8BIT if held else ADAMW}
    changed = [
        f"{flag(name)} was {_shown(before[name])} and is {_shown(now[name])}"
        for name in OF_THE_OPTIMIZER
        if name in before and before[name] != now[name]
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint}: holds the state of another optimiser: {', '.join(changed)}. Give what "
            "it was, or the --card that the run began with; or start in another --output-dir with "
            "this checkpoint's controlnet/ as --controlnet-model-name-or-path."
        )


def _shown(value: object) -> object:
    return (" ".join(map(str, value)) or "not given") if isinstance(value, list) else value


def _is_8bit(path: Path) -> bool | None:
    """Return whether a file holds the state of AdamW in 8 bit or in 32, by its names.

    None if that cannot be told: it has no state yet, or cannot be read, which `restore` explains.
    FSDP2 and DeepSpeed write no such file, and go with torch's alone.
    """
    try:
        saved = torch.load(path, map_location="cpu", mmap=True)["state"]  # reads no numbers
        names = {name for state in saved.values() for name in flat_state(state)}
    except (EOFError, OSError, RuntimeError, ValueError, KeyError, pickle.PickleError):
        return None
    return "state2" in names if names & {"state2", "exp_avg"} else None


def describe_step_change(
    checkpoint: Path, saved: TrainState, config: TrainConfig, num_processes: int
) -> str | None:
    """Return a sentence about steps that take another number of samples from a checkpoint on.

    None if they take as many, or if the checkpoint's run.json does not say.

    Args:
        checkpoint: its folder.
        saved: what it says.
        config: of the run that goes on.
        num_processes: that it goes on with.
    """
    before = read_settings(checkpoint)
    names = ("train_batch_size", "gradient_accumulation_steps")
    if not all(isinstance(before.get(name), int) for name in names):
        return None
    compared = [(flag(name), int(before[name]), int(getattr(config, name))) for name in names]
    compared.append(("the number of processes", saved.num_processes, num_processes))
    was, now = (math.prod(one[column] for one in compared) for column in (1, 2))
    if was == now:
        return None
    changed = [f"{name} was {old} and is {new}" for name, old, new in compared if old != new]
    return (
        f"{checkpoint.name}: a step took {was} samples, and takes {now} from now on: "
        f"{', '.join(changed)}"
    )


def describe_base_change(checkpoint: Path, config: TrainConfig) -> str | None:
    """Return a sentence about another base model than a checkpoint was trained beside.

    None if it is the same by its name, or if the checkpoint's run.json does not say.

    Args:
        checkpoint: its folder.
        config: of the run that goes on.
    """
    before, now = read_settings(checkpoint), as_dict(config)
    changed = [
        f"{flag(name)} was {before[name] or 'not given'} and is {now[name] or 'not given'}"
        for name in OF_THE_BASE
        if name in before and before[name] != now[name]
    ]
    return f"{checkpoint.name}: another base from now on: {', '.join(changed)}" if changed else None


def _newest_whole(present: list[Path]) -> Path | None:
    """Return the last checkpoint that is whole, and name the damaged ones after it."""
    problems: list[str] = []
    for checkpoint in reversed(present):
        try:
            problem = find_damage(checkpoint)
        except OSError as error:
            raise ConfigError(
                f"{checkpoint}: cannot be read ({os_error_line(error)}), which need not be damage. "
                "The same command goes on once it can be; to go on from an earlier one, name it: "
                "--resume-from-checkpoint checkpoint-<step>."
            ) from error
        if problem is None:
            for line in problems:
                click.echo(f"train: {line}; going on from {checkpoint.name}")
            return checkpoint
        problems.append(problem)
    if problems:
        raise ConfigError(
            f"{problems[0]}; and none of the earlier checkpoints is whole. Fetch one from a "
            "backup, or start in another --output-dir."
        )
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return find_damage(checkpoint) is None
    except OSError:
        return False


def _named(output_dir: Path, present: list[Path], wanted: str) -> Path:
    candidates = (Path(wanted), output_dir / Path(wanted).name)
    complete = [path for path in candidates if (path / STATE_FILE).is_file()]
    folders = complete or [path for path in candidates if path in find_all(path.parent)]
    if not folders:
        names = ", ".join(path.name for path in present) or "none"
        raise ConfigError(
            f"--resume-from-checkpoint {wanted}: no complete checkpoint; {output_dir} has {names}."
        )
    path = folders[0]
    if problem := find_damage(path):
        raise ConfigError(f"{problem}; {WAY_OUT}")
    step = read_state(path).step
    later = [other for other in present if recorded_step(other) > step]
    # Damaged ones may stay: the run passes them over.
    if any(_is_whole(other) for other in reversed(later)):
        names = ", ".join(other.name for other in later)
        raise ConfigError(
            f"--resume-from-checkpoint {wanted}: {output_dir} holds later ones, "
            f"{names}; move them away, or give another --output-dir."
        )
    return path
