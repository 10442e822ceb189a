"""Shards: equal bytes for equal records, and nothing half-written."""

import hashlib
import json
import os
import re
import tarfile
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
import webdataset

from common import atomic_files
from common.atomic_files import atomic_file
from common.errors import ShardError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.format import sidecar
from shards.format.json_files import LARGEST_FILE_BYTES
from shards.format.keys import record_key, slot_of
from shards.format.records import Record, to_members
from shards.format.writer import write_shard
from tests.conftest import flags, run_python


def records(count: int = 3) -> list[Record]:
    return [
        Record(
            record_key(7, slot, f"{slot:032x}"),
            {"latent": torch.full((2, 3), float(slot)), "other": torch.arange(slot + 1)},
            {"prompt": f"número {slot}"},
        )
        for slot in range(count)
    ]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shard(tmp_path / folder, 7, records(), fingerprint="f")
    for name in ("000007.tar", "000007.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_sidecar_describes_the_tar(tmp_path: Path) -> None:
    written = write_shard(tmp_path, 7, records(), fingerprint="f")
    data = (tmp_path / "000007.tar").read_bytes()
    assert written.tar_bytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert sidecar.load(tmp_path, 7) == written
    with tarfile.open(tmp_path / "000007.tar") as tar:
        for key, span in zip(written.keys, written.spans, strict=True):
            start, size, metadata_start, metadata_size = span
            tensors = tar.extractfile(f"{key}.safetensors")
            metadata = tar.extractfile(f"{key}.json")
            assert tensors is not None
            assert metadata is not None
            assert data[start : start + size] == tensors.read()
            assert data[metadata_start : metadata_start + metadata_size] == metadata.read()


def test_members_bear_no_trace_of_time_or_owner(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    with tarfile.open(tmp_path / "000007.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
            assert (member.uname, member.gname, member.mode) == ("", "", 0o644)


def test_webdataset_streams_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    samples = list(webdataset.WebDataset(str(tmp_path / "000007.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [record.key for record in records()]
    for sample, record in zip(samples, records(), strict=True):
        assert json.loads(sample["json"]) == record.metadata
        loaded = safetensors.torch.load(sample["safetensors"])
        assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
            name: tensor.tolist() for name, tensor in record.tensors.items()
        }


def test_a_record_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    def failing() -> object:
        yield records()[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(tmp_path, 7, failing(), fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_the_old_shard_stands_until_the_new_tar_is_whole(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="old")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing() -> object:
        yield records()[0]
        assert {name: (tmp_path / name).read_bytes() for name in before} == before
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(tmp_path, 7, failing(), fingerprint="new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_shard(tmp_path, 7, records(2), fingerprint="new")
    found = sidecar.load(tmp_path, 7)
    assert found is not None
    assert (found.fingerprint, found.num_records) == ("new", 2)


def test_no_sidecar_stands_beside_a_tar_that_it_was_not_written_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[bool] = []
    move = atomic_files.move_into_place

    def look(temporary: Path, path: Path) -> None:
        move(temporary, path)
        if path.suffix == ".tar":  # the power may fail now
            beside.append((tmp_path / "000007.json").exists())

    monkeypatch.setattr(atomic_files, "move_into_place", look)
    for fingerprint in ("old", "new"):
        write_shard(tmp_path, 7, records(), fingerprint=fingerprint)
    assert beside == [False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007.json", "000007.tar"]


def test_a_record_is_taken_over_byte_for_byte(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "a", 7, records(), fingerprint="f")
    members = [to_members(record) for record in records()]
    assert write_shard(tmp_path / "b", 7, members, fingerprint="f") == written


def test_a_summary_says_what_the_sidecar_says_while_its_tar_is_there(tmp_path: Path) -> None:
    assert sidecar.load_summary(tmp_path, 7) is None
    written = write_shard(tmp_path, 7, records(), fingerprint="f", identity="i", captions="c")
    found = sidecar.load_summary(tmp_path, 7)
    assert found is not None
    assert vars(found) == {name: getattr(written, name) for name in vars(found)}
    assert (found.shard, found.fingerprint, found.identity, found.captions) == (7, "f", "i", "c")
    tar = tmp_path / "000007.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    assert sidecar.load_summary(tmp_path, 7) is None
    tar.unlink()
    assert sidecar.load_summary(tmp_path, 7) is None


def test_two_records_with_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="out of order"):
        write_shard(tmp_path, 7, [records()[0]] * 2, fingerprint="f")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="cannot write") as caught,
        atomic_file(tmp_path / "file" / "x"),
    ):
        pass
    assert caught.value.filename == str(tmp_path / "file" / "x")


def test_a_key_is_an_address() -> None:
    key = record_key(12, 345, "0123456789abcdef0123")
    assert key == "000012-00345-0123456789abcdef"
    assert slot_of(key) == (12, 345)
    for wrong in ("", "12", "x-1-2", "../../etc"):
        with pytest.raises(ShardError, match="not a record key"):
            slot_of(wrong)


@pytest.mark.parametrize(
    "edit",
    [
        {"spans": [[0, 1, 2, 3]]},
        {"spans": [[-1, 1, 512, 3]] * 3},
        {"spans": [[0, 1 << 60, 1 << 61, 3]] * 3},
        {"spans": [[512, 88, 700, 50], [620, 30, 700, 50], [800, 50, 900, 50]]},  # overlap
        {"keys": None},
        {"skipped": [{"row": 1}]},
        {"keys": ["../../etc/passwd"] * 3},
        {"keys": ["000007-00000-0000000000000000"] * 3},
        {"tar_bytes": 1e3},
        {"tar_bytes": 10**400},
        {"sha256": None},
        {"shard": 8},
        {"checksums": []},
        {"checksums": ["0" * 31 + "x"] * 3},
        {"keys": ["000007-00000-0000000000000000\n000007-00001-0000000000000000", "", ""]},
    ],
)
def test_a_damaged_sidecar_is_named(tmp_path: Path, edit: dict[str, object]) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    path = tmp_path / "000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ShardError, match=r"000007\.json: (damaged|the sidecar of)"):
        sidecar.load(tmp_path, 7)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"a":' * 100_000, "\xff", "NaN"]
)
def test_what_is_no_sidecar_is_refused(tmp_path: Path, text: str) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    (tmp_path / "000007.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=r"000007\.json: damaged"):
        sidecar.load(tmp_path, 7)


def test_a_file_too_large_or_no_file_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    path = tmp_path / "000007.json"
    os.truncate(path, LARGEST_FILE_BYTES + 1)  # sparse
    with pytest.raises(ShardError, match="over 64 MB"):
        sidecar.load(tmp_path, 7)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match="not a file"):
        sidecar.load(tmp_path, 7)


def test_a_sidecar_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    (tmp_path / "000007.json").rename(tmp_path / "000008.json")
    with pytest.raises(ShardError, match="the sidecar of shard 000007 under another's name"):
        sidecar.load(tmp_path, 8)


@pytest.mark.parametrize("version", [0, 2])
def test_another_format_version_is_refused(tmp_path: Path, version: int) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    path = tmp_path / "000007.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    with pytest.raises(ShardError, match=f"format {version}, this version reads 1"):
        sidecar.load(tmp_path, 7)


def test_the_datasets_library_reads_shards(tmp_path: Path) -> None:
    write_shard(tmp_path, 7, records(), fingerprint="f")
    rows = datasets.load_dataset(
        "webdataset",
        data_files={"train": [str(tmp_path / "000007.tar")]},
        split="train",
        cache_dir=str(tmp_path / "datasets"),
    )
    assert [row["__key__"] for row in rows] == [record.key for record in records()]
    for row, record in zip(rows, records(), strict=True):
        assert row["json"] == record.metadata
        loaded = safetensors.torch.load(row["safetensors"])
        assert all(torch.equal(loaded[name], tensor) for name, tensor in record.tensors.items())


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from precompute.__main__ import main
main(sys.argv[2:], prog_name="python -m precompute")
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_finished_shards_stay(
    fresh: PrecomputeConfig, cache: Path
) -> None:
    # The kernel refuses to let any file grow beyond a text shard: the latents do not fit.
    limit = max(path.stat().st_size for path in (cache / "text").glob("*.tar"))
    assert (cache / "latents" / "000000.tar").stat().st_size > limit
    done = run_python("-c", FULL_DISK, limit, *flags(fresh))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    (line,) = lines
    assert line.startswith(f"Error: {fresh.cache}/latents/000000.tar: cannot write: ")
    assert re.search(r"\(about \d\.\d MB needed, [\d.]+ MB free\); make room and run again$", line)
    assert "Traceback" not in done.stderr
    for path in (cache / "text").iterdir():
        assert (fresh.cache / "text" / path.name).read_bytes() == path.read_bytes()
    assert not list(fresh.cache.rglob("*.tmp-*"))
    assert not (fresh.cache / "manifest.json").exists()
    precompute(fresh)
    assert (fresh.cache / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()


def test_what_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write: No space .*about 1000000000000\.0 MB needed"):
        write_shard(tmp_path, 7, records(), fingerprint="f", num_bytes=10**18)
    assert list(tmp_path.iterdir()) == []
