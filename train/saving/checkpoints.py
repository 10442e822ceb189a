"""Checkpoints: written to a temporary folder, synced and renamed, so that each is complete.

Neither a killed process nor a power failure leaves half of one: older ones are removed only when
the new one is on the disk.

checkpoint-500/
    train_state.json      written last: see `TrainState`
    run.json              settings and versions, for people
    controlnet/           as diffusers loads it
    controlnet_ema/       the averaged weights in the same form, if there are any
    optimizer.bin, scheduler.bin, random_states_*.pkl, scaler.pt    accelerate's; for FSDP2 and
                          DeepSpeed folders with a file of each process
"""

import json
import shutil
from collections import ChainMap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from xxhash import xxh3_128

from common.atomic_files import move_into_place, sync_tree, write_text
from common.errors import ConfigError, RunError, os_error_line, raised_everywhere
from common.provenance import write_run
from train.config import TrainConfig
from train.optim.ema import Ema
from train.processes.agreement import main_decides
from train.processes.strategy import Strategy, strategy
from train.saving.controlnet import EMA_FOLDER, save_controlnet
from train.saving.digests import FileDigest, deal, digest_files, file_names
from train.saving.write_state import write_state

STATE_FILE = "train_state.json"
PREFIX = "checkpoint-"
Result = TypeVar("Result")


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
        files: the checkpoint's other files, by path; empty in checkpoints of earlier versions.
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
    files: dict[str, FileDigest] = field(default_factory=dict)


def find(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first, whatever numbers they bear."""
    return [path for path in find_all(output_dir) if (path / STATE_FILE).is_file()]


def find_all(output_dir: Path) -> list[Path]:
    """Return all checkpoints in a folder, oldest first, also those that lack their state file."""
    folders = [path for path in output_dir.glob(f"{PREFIX}*") if path.is_dir()]
    numbered = [path for path in folders if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(numbered, key=lambda path: (recorded_step(path), _number(path)))


def recorded_step(checkpoint: Path) -> int:
    """Return the step that a checkpoint says it was saved after; by its name if it is damaged."""
    try:
        return parse_state(checkpoint).step
    except (OSError, ValueError):
        return _number(checkpoint)


def parse_state(checkpoint: Path) -> TrainState:
    """Return where a run stood when it saved a checkpoint.

    Raises:
        OSError: its state file cannot be read.
        ValueError: its state file is damaged.
    """
    data = (checkpoint / STATE_FILE).read_bytes()
    try:
        document = msgspec.json.decode(data, type=dict[str, Any])
        digest = document.pop("digest", None)  # earlier versions wrote none
        state = msgspec.convert(document, TrainState)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    if unknown := document.keys() - {entry.name for entry in fields(TrainState)}:
        raise ValueError(f"unknown entry {min(unknown)!r}")
    if digest is not None and data != _with_digest(data.replace(_digest_entry(digest), b"", 1)):
        raise ValueError("does not hold the bytes that were written")
    return state


def _write_state(path: Path, state: TrainState) -> None:
    write_text(path, _with_digest((json.dumps(asdict(state)) + "\n").encode()).decode())


def _with_digest(document: bytes) -> bytes:
    """Return a JSON object with the digest of its own bytes as the first entry."""
    return b"{" + _digest_entry(xxh3_128(document).hexdigest()) + document[1:]


def _digest_entry(digest: object) -> bytes:
    return f'"digest": "{digest}", '.encode()


def read_state(checkpoint: Path) -> TrainState:
    """Return where a run stood when it saved a checkpoint.

    Raises:
        ConfigError: its state file is damaged.
    """
    try:
        return parse_state(checkpoint)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{checkpoint / STATE_FILE}: damaged ({error}); resume from an earlier one."
        ) from error


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
        RunError: it could not be written, or weights are not finite; earlier ones are unchanged.
    """
    final = config.output_dir / f"{PREFIX}{state.step}"
    partial = final.with_name(f"{final.name}.partial")

    def on_all(phase: Callable[[], Result]) -> list[Result]:
        return _run_on_all(accelerator, phase, partial)

    def begin() -> None:
        if accelerator.is_main_process:
            for leftover in (*_leftovers(config.output_dir, "partial"), partial):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)

    def write() -> None:
        write_state(accelerator, partial)
        if ema is not None:
            save_controlnet(accelerator, ema.network, partial / EMA_FOLDER, ema)

    def settle() -> list[str]:
        # On each process: a network disk may sync for a machine only what that machine wrote.
        sync_tree(partial)
        return file_names(partial)

    on_all(begin)
    on_all(write)
    dealt = deal(on_all(settle))
    digests = on_all(lambda: digest_files(partial, dealt[accelerator.process_index]))
    state = replace(
        state,
        averaged_steps=ema.num_steps if ema else 0,
        distribution=strategy(accelerator),
        num_processes=accelerator.num_processes,
        files=dict(sorted(ChainMap(*digests).items())),
    )

    def complete() -> None:
        if accelerator.is_main_process:
            write_run(partial, "train", config)
            _write_state(partial / STATE_FILE, state)
            _put_in_place(partial, final)
            _remove_old(final, config.checkpoints_total_limit)

    on_all(complete)
    return final


def _run_on_all(
    accelerator: Accelerator, phase: Callable[[], Result], partial: Path
) -> list[Result]:
    """Run a phase of saving on all processes; if it fails on any, all of them raise.

    Returns:
        What it returned on each process.

    Raises:
        RunError: it failed on at least one process.
    """
    result, problem, advice = None, "", ""
    try:
        result = phase()
    except RunError as error:
        problem = str(error)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        problem = os_error_line(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        advice = " Make room, or give --checkpoints-total-limit, and go on with "
    outcomes = gather_object([(result, problem, advice)])
    failed = [outcome for outcome in outcomes if outcome[1]]
    if not failed:
        return [outcome[0] for outcome in outcomes]
    _, problem, advice = failed[0]

    def kept() -> str:
        shutil.rmtree(partial, ignore_errors=True)
        present = find(partial.parent)
        return f"{present[-1].name} is kept" if present else "there is no earlier one"

    raise raised_everywhere(
        RunError(
            f"{partial.with_suffix('')} could not be written ({problem}); {main_decides(kept)}."
            + (f"{advice}--resume-from-checkpoint latest." if advice else "")
        )
    )


def _put_in_place(partial: Path, final: Path) -> None:
    """Give a finished checkpoint its name, so that neither it nor one of that name is ever half."""
    if final.is_dir():
        _set_aside(final)
    move_into_place(partial, final)
    for removed in _leftovers(final.parent, "removed"):
        shutil.rmtree(removed)


def _remove_old(written: Path, limit: int | None) -> None:
    """Remove all complete checkpoints but `limit`; None keeps them all.

    The one just written stays. Later ones go first: they are damaged, else the run would have gone
    on from them.
    """
    if limit is None:
        return
    step = recorded_step(written)
    others = [path for path in find(written.parent) if path != written]
    others.sort(key=lambda path: recorded_step(path) <= step)  # keeps their order otherwise
    for old in others[: max(0, len(others) - (limit - 1))]:
        shutil.rmtree(_set_aside(old))


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint, so that an interruption leaves no half of it under its name."""
    removed = checkpoint.with_name(f"{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    return checkpoint.rename(removed)


def _leftovers(output_dir: Path, suffix: str) -> list[Path]:
    """Return what interrupted runs left of checkpoints: `partial` or `removed`."""
    return sorted(output_dir.glob(f"{PREFIX}*.{suffix}"))


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))
