"""What is on the disk when: files, then their folder, then the new name, and only then removals."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128

from train.config import TrainConfig
from train.run import train
from train.saving.digests import FileDigest, deal, digest_files, file_names

State = tuple[int, int]  # size and time of the last change


class Disk:
    """Records what was synced, renamed and removed, and passes it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path]] = []
        self.synced: dict[int, State] = {}
        fsync, rmtree = os.fsync, shutil.rmtree

        def recording_fsync(descriptor: int) -> None:
            fsync(descriptor)
            found = os.fstat(descriptor)
            self.synced[found.st_ino] = (found.st_size, found.st_mtime_ns)
            self.events.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))

        def recording_rmtree(path: Path, **options: Any) -> None:
            if Path(path).is_dir():
                self.events.append(("remove", Path(path)))
            rmtree(path, **options)

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(shutil, "rmtree", recording_rmtree)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._recording(getattr(os, name)))

    def _recording(self, rename: Callable[..., None]) -> Callable[..., None]:
        def recording(source: Path, target: Path, **options: Any) -> None:
            moved = Path(source)
            inside = [moved, *moved.rglob("*")]
            unsynced = [path for path in inside if not self.is_synced(path)]
            rename(source, target, **options)
            self.events.append(("rename unsynced" if unsynced else "rename", Path(target)))

        return recording

    def is_synced(self, path: Path) -> bool:
        """Whether nothing has changed in a file or folder since it was last synced."""
        found = path.stat()
        return self.synced.get(found.st_ino) == (found.st_size, found.st_mtime_ns)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_older_ones_go_last(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train_config.output_dir
    disk = Disk(monkeypatch)
    train(replace(train_config, checkpoints_total_limit=1, ema_decay=0.9))
    first, second = (("rename", out / f"checkpoint-{step}") for step in (2, 4))
    named = disk.events.index(second)
    assert disk.events.index(first) < named
    assert ("rename unsynced", out / "checkpoint-4") not in disk.events
    assert disk.events[named + 1] == ("sync", out)
    # Each process syncs what it wrote before it takes digests; only then come settings and state.
    partial = out / "checkpoint-4.partial"
    settled = disk.events[: disk.events.index(("rename", partial / "run.json"))]
    written = ("optimizer.bin", "random_states_0.pkl", "controlnet/config.json", "controlnet_ema")
    for path in (partial, *(partial / name for name in written)):
        assert ("sync", path) in settled
    pruned = [event for event in disk.events if event[0] == "remove"]
    assert pruned == [("remove", out / "checkpoint-2.removed")]
    assert disk.events.index(pruned[0]) > named + 1


def test_the_result_is_on_the_disk_before_it_has_its_name(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(train_config, validation_steps=4, num_validation_images=1, ema_decay=0.9)
    out = config.output_dir
    disk = Disk(monkeypatch)
    train(replace(config, validation_inference_steps=1))
    for folder in (out, out / "controlnet_ema"):
        weights, configuration = (
            disk.events.index(("rename", folder / name))
            for name in ("diffusion_pytorch_model.safetensors", "config.json")
        )
        # The configuration makes it a model: it comes when the weights are there to stay.
        assert ("sync", folder) in disk.events[weights:configuration]
        assert ("sync", folder) in disk.events[configuration:]
    assert ("rename", out / "validation" / "step-000004") in disk.events


def test_each_file_goes_to_one_process_that_sees_it() -> None:
    assert deal([["a", "b", "c", "d"]] * 2) == [["a", "c"], ["b", "d"]]
    # Each of two machines sees what it wrote, and only later what the other did.
    assert deal([["a", "0"], ["a", "1"], ["a", "1"]]) == [["0"], [], ["1", "a"]]


def test_digests_are_those_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "large").write_bytes(data)
    (tmp_path / "empty").write_bytes(b"")
    assert digest_files(tmp_path, file_names(tmp_path)) == {
        "empty": FileDigest(0, "99aa06d3014798d86001c324468d497f"),  # XXH3's of no bytes
        "folder/large": FileDigest(1 << 21, xxh3_128(data).hexdigest()),
    }
