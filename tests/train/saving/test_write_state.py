"""accelerate's part of a checkpoint, where processes wait for each other."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from train.saving.write_state import _errors_held_back


def test_what_deepspeed_could_not_write_is_raised_after_the_processes_have_met() -> None:
    """With its two ways of writing alone; tests/train/saving/test_ranks.py runs all of it."""

    class Writer:
        def save(self, path: Path) -> None:
            raise OSError(errno.ENOSPC, "full", str(path))

    engine = SimpleNamespace(checkpoint_engine=Writer(), _copy_recovery_script=lambda: None)
    met = []

    def write() -> None:
        with _errors_held_back(engine):
            engine.checkpoint_engine.save(Path("state"))
            met.append(True)

    with pytest.raises(OSError, match="full"):
        write()
    assert met
