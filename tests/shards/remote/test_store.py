"""What is done with a store of files: a store in memory, which fsspec has as it has S3."""

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.errors import ConfigError, ShardError
from shards.format import manifest
from shards.remote import folder, retry, transfer
from shards.remote.folder import RemoteFolder
from shards.remote.shard_files import for_each_shard

URL = "memory://caches/circles"


class ListingStore(MemoryFileSystem):
    """Remembers listings, as those of the clouds do, and does as a test wants."""

    misbehave: Callable[[str, Any], None] = lambda *_: None
    done: list[tuple[str, str]] = []  # noqa: RUF012
    known: dict[str, Any] = {}  # noqa: RUF012

    def info(self, path: str, **more: Any) -> Any:
        if path not in self.known:
            self.known[path] = super().info(path, **more)
        return self.known[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.known.clear()

    def put_file(self, lpath: str, rpath: str, *more: Any, **others: Any) -> None:
        super().put_file(lpath, rpath, *more, **others)
        type(self).done.append(("put", rpath.removeprefix(f"{URL}/")))
        type(self).misbehave(rpath, self)

    def rm_file(self, path: str) -> None:
        super().rm_file(path)
        type(self).done.append(("remove", path.removeprefix(f"{URL}/")))


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ListingStore]]:
    monkeypatch.setattr(folder, "SCHEMES", (*folder.SCHEMES, "memory"))
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    fsspec.register_implementation("memory", ListingStore, clobber=True)
    monkeypatch.setattr(ListingStore, "done", [])
    monkeypatch.setattr(ListingStore, "known", {})
    MemoryFileSystem.store.clear()
    yield ListingStore
    MemoryFileSystem.store.clear()
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


def test_an_upload_that_was_cut_short_is_sent_again_or_refused(
    store: type[ListingStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    remote, cuts = RemoteFolder(URL), [2]

    def cut(path: str, fs: ListingStore) -> None:
        if cuts[0] > 0:
            cuts[0] -= 1
            with fs.open(path, "wb") as file:
                file.write(bytes(60))

    monkeypatch.setattr(store, "misbehave", cut)
    remote.put(tmp_path / "file", "file")
    assert remote.size("file") == 100
    assert len(store.done) == 3
    cuts[0] = 100
    with pytest.raises(ShardError, match=r"/file: 100 bytes were sent, and 60 are there \(tried 6"):
        remote.put(tmp_path / "file", "file")


def test_sizes_are_those_of_now(store: type[ListingStore], tmp_path: Path) -> None:
    remote = RemoteFolder(URL)
    for size in (10, 20):
        (tmp_path / "file").write_bytes(bytes(size))
        remote.put(tmp_path / "file", "file")
        assert remote.size("file") == size


def test_a_push_changes_a_shard_in_this_order(
    store: type[ListingStore], cache: Path, tmp_path: Path
) -> None:
    """Neither a sidecar nor a manifest ever stands beside what it was not written for."""
    remote = RemoteFolder(URL)
    transfer.push(cache, remote)
    for number in range(manifest.load(cache).text.num_shards):
        own = [name for _, name in store.done if name.startswith(f"text/{number:06d}")]
        assert own == [f"text/{number:06d}.tar", f"text/{number:06d}.json"]
    assert store.done[-1] == ("put", "manifest.json")
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    manifest.write(other, replace(manifest.load(other), num_skipped=3))
    fs = remote.fs
    fs.pipe_file(f"{URL}/text/000001.json", b"{}")  # of another cache, its tar of the same size
    store.done.clear()
    assert transfer.push(other, remote, overwrite=True).copied == 1
    changes = [name for name in store.done if name[1] != "run.json"]
    assert changes == [
        ("remove", "manifest.json"),
        ("remove", "samples.parquet"),
        ("remove", "text/000001.json"),
        ("put", "text/000001.tar"),
        ("put", "text/000001.json"),
        ("put", "samples.parquet"),
        ("put", "manifest.json"),
    ]


def test_giving_up_does_not_end_later_transfers(tmp_path: Path) -> None:
    remote = RemoteFolder(URL)
    (tmp_path / "file").write_bytes(bytes(10))
    remote.give_up()
    remote.put(tmp_path / "file", "file")
    assert remote.read("file") == bytes(10)


def test_addresses_are_not_chained() -> None:
    for address in ("s3://bucket::http://host/x", "http://host/x::https://other"):
        with pytest.raises(ConfigError, match="not an address of a cache"):
            RemoteFolder(address)


def test_waits_between_attempts_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(retry.random, "uniform", lambda low, high: high)
    waits: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return False

    def act() -> None:
        raise ConnectionError("away")

    with pytest.raises(ShardError, match=r"x: ConnectionError: away \(tried 6 times\)"):
        retry.with_retries("x", act, Clock())
    assert waits == [1, 2, 4, 8, 16]


def test_an_error_in_one_thread_ends_the_others(cache: Path) -> None:
    given_up = threading.Event()

    def copy(files: Any) -> bool:
        if files.tar == "text/000000.tar":
            raise ShardError("first")
        if not given_up.wait(20):  # as a transfer that is tried again
            pytest.fail("not given up")
        return True

    with pytest.raises(ShardError, match="first"):
        for_each_shard("test", manifest.load(cache), copy, give_up=given_up.set)
    assert given_up.is_set()
