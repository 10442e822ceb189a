"""One run at a time in an output folder."""

import errno
import fcntl
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from common.errors import ConfigError
from tests.conftest import Outcome, Spoil, flags, running
from tests.train.test_run import WEIGHTS, same
from train.config import TrainConfig
from train.run import train
from train.saving.output_dir import LOCK_FILE, output_dir_locked

# `running` kills the holder at the end, as SIGKILL ends a run.
HOLD = "import fcntl, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX)"
WAIT = "print('held', flush=True); time.sleep(600)"


def test_a_second_run_is_refused_while_the_first_goes_on(
    train_config: TrainConfig, in_batch: Callable[[int, Spoil], None], tmp_path: Path
) -> None:
    """Its first act was to remove the checkpoint that the first was writing."""
    refusals: list[str] = []
    partial = train_config.output_dir / "checkpoint-2.partial"

    def start_another(losses: Tensor, _: Any) -> Tensor:
        partial.mkdir()
        with pytest.raises(ConfigError, match="another run writes to it") as caught:
            train(replace(train_config, resume_from_checkpoint="latest", checkpointing_steps=1))
        assert partial.is_dir()
        partial.rmdir()
        refusals.append(str(caught.value))
        return losses

    in_batch(2, start_another)
    train(train_config)
    (line,) = refusals
    assert line.startswith(f"--output-dir {train_config.output_dir}: ")
    assert f"process {os.getpid()} on " in line
    assert not (train_config.output_dir / LOCK_FILE).exists()
    whole = replace(train_config, output_dir=tmp_path / "whole")
    train(whole)
    assert same(whole.output_dir, train_config.output_dir)


def test_a_killed_run_leaves_nothing_stuck(train_config: TrainConfig) -> None:
    out = train_config.output_dir
    out.mkdir()
    with running(["-c", f"{HOLD}; {WAIT}", out / LOCK_FILE], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run"):
            train(train_config)
        assert list(out.iterdir()) == [out / LOCK_FILE]
    train(train_config)
    assert (out / WEIGHTS).is_file()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_does_not_stop_training(
    train_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Outcome],
    number: int,
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    outcome = command("train", *flags(replace(train_config, max_train_steps=1)))
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count("this disk has no file locks; start no second run in it") == 1
    assert (train_config.output_dir / WEIGHTS).is_file()


def test_a_lock_on_a_file_that_was_just_removed_counts_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, lock, calls = tmp_path / LOCK_FILE, fcntl.flock, 0

    def flock(file: Any, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the run before ends between this one's open and its lock
            path.unlink()
        lock(file, operation)

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        held = output_dir_locked(tmp_path)
        held.__enter__()
    with path.open("a") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_start_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with output_dir_locked(folder):
            raise KeyError

    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(KeyError):
            fail(folder)
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())
