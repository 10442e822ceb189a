"""accelerate's part of a checkpoint, where processes wait for each other."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from common.errors import RunError
from train.saving import checkpoints
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


def test_a_process_other_than_the_first_that_cannot_write_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process tells all others how its part went."""

    def gather(ours: list[object]) -> list[object]:
        return [*ours, (None, "Disk quota exceeded", " Make room, and go on with ")]

    monkeypatch.setattr(checkpoints, "gather_object", gather)
    partial = tmp_path / "checkpoint-4.partial"
    partial.mkdir()
    told = (
        r"checkpoint-4 could not be written \(Disk quota exceeded\); there is no earlier one\. Make"
    )
    with pytest.raises(RunError, match=told):
        checkpoints._run_on_all(Accelerator(cpu=True), lambda: "written", partial)
    assert not partial.exists()
