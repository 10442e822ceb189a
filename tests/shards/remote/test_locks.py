"""The local folder of a remote cache on disks whose locks are not those of a local disk."""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shards.reading.cache import Cache
from shards.remote import local_copies
from shards.remote.folder import RemoteFolder
from shards.remote.local_copies import LocalCopies
from tests.shards.remote.conftest import Server
from tests.shards.remote.test_streaming import everything, open_remote, same, tar_bytes

pytestmark = pytest.mark.usefixtures("patience")
Flock = Callable[[Any, int], None]
on_this_disk = fcntl.flock


def on_nfs(file: Any, operation: int) -> None:
    """Lock as Linux's NFS client does: by byte ranges, which want a file opened to match."""
    descriptor = file if isinstance(file, int) else file.fileno()
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    wrong = {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}
    if mode == wrong.get(operation & ~fcntl.LOCK_NB):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    on_this_disk(descriptor, operation)


def never(number: int) -> Flock:
    def flock(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture
def two_tars(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> Callable[[], LocalCopies]:
    """Make local copies of two tars with room for no more; call it once a process."""
    local = tmp_path / "local"
    remote = RemoteFolder(serve(cache).url)

    def copies() -> LocalCopies:
        made = LocalCopies(remote, local, "cache", limit_bytes=1)
        for shard in (0, 1):
            path = made.tar_path(("latents", shard))
            data = (cache / "latents" / path.name).read_bytes()
            made.fetch(path, len(data), hashlib.sha256(data).hexdigest())
        return made

    return copies


@pytest.mark.parametrize(
    "flock",
    [on_nfs, never(errno.ENOLCK), never(errno.ENOSYS), never(errno.EOPNOTSUPP)],
    ids=["nfs", "enolck", "enosys", "eopnotsupp"],
)
def test_the_folder_stays_bounded_on_any_disk(
    cache: Path,
    tmp_path: Path,
    serve: Callable[[Path], Server],
    flock: Flock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(local_copies, "_said", set())
    largest = max(path.stat().st_size for path in cache.rglob("*.tar"))
    found = open_remote(serve(cache).url, tmp_path / "local", 2 * largest)
    assert same(everything(found), everything(Cache(cache)))
    assert 0 < tar_bytes(tmp_path / "local") <= 2 * largest
    said = capsys.readouterr().err.count("this disk has no file locks")
    assert said == (0 if flock is on_nfs else 1)


@pytest.mark.parametrize("flock", [on_this_disk, on_nfs], ids=["local", "nfs"])
def test_a_tar_that_another_process_has_open_stays(
    cache: Path,
    two_tars: Callable[[], LocalCopies],
    flock: Flock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    ours, theirs = two_tars(), two_tars()
    theirs.open(("latents", 0))
    ours.make_room(0, [])
    assert ours.tar_path(("latents", 0)).exists()
    assert not ours.tar_path(("latents", 1)).exists()
    theirs.close_others([])
    ours.make_room(0, [])
    assert not ours.tar_path(("latents", 0)).exists()


@pytest.mark.parametrize("flock", [on_this_disk, never(errno.ENOLCK)], ids=["locks", "none"])
def test_a_tar_removed_while_it_is_opened_is_not_there(
    two_tars: Callable[[], LocalCopies], flock: Flock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does it: the removed file lives on under another name, with as many links."""
    copies = two_tars()
    path = copies.tar_path(("latents", 0))

    def removed_meanwhile(file: Any, operation: int) -> None:
        path.rename(path.with_name(".nfs0001"))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    with pytest.raises(FileNotFoundError):
        copies.open(("latents", 0))
    assert copies.opened(("latents", 0)) is None


def test_a_tar_fetched_again_while_it_is_opened_is_another_file(
    two_tars: Callable[[], LocalCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = two_tars()
    path = copies.tar_path(("latents", 0))

    def replaced_meanwhile(file: Any, operation: int) -> None:
        path.rename(path.with_name(".nfs0001"))
        path.write_bytes(b"fetched by another process")
        on_this_disk(file, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with pytest.raises(FileNotFoundError):
        copies.open(("latents", 0))  # what nobody holds a lock of, another process may remove


def test_without_locks_a_removed_tar_is_read_to_its_end(
    cache: Path, two_tars: Callable[[], LocalCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", never(errno.ENOLCK))
    ours, theirs = two_tars(), two_tars()
    file = theirs.open(("latents", 0))
    ours.make_room(0, [])
    assert not ours.tar_path(("latents", 0)).exists()
    right = (cache / "latents" / "000000.tar").read_bytes()
    read = bytearray(len(right))
    assert file.read_into([read], 0, len(right)) == len(right)
    assert read == right


def test_what_killed_transfers_left_goes_after_a_while(
    two_tars: Callable[[], LocalCopies],
) -> None:
    copies = two_tars()
    old, new = (copies.root / "latents" / f"000009.tar.{name}.part" for name in ("old", "new"))
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    two_tars()
    assert not old.exists()
    assert new.exists()


def test_the_copies_that_were_opened_longest_ago_go_first(
    two_tars: Callable[[], LocalCopies],
) -> None:
    copies = two_tars()
    first, second = (copies.tar_path(("latents", shard)) for shard in (0, 1))
    os.utime(first, (2000, 2000))
    os.utime(second, (1000, 1000))
    copies.limit_bytes = first.stat().st_size + second.stat().st_size
    assert copies.make_room(1, [])
    assert first.exists()
    assert not second.exists()


def test_what_arrives_and_what_is_needed_take_room(two_tars: Callable[[], LocalCopies]) -> None:
    copies = two_tars()
    paths = [copies.tar_path(("latents", shard)) for shard in (0, 1)]
    copies.limit_bytes = sum(path.stat().st_size for path in paths) + 100
    assert copies.make_room(100, [])
    copies.arriving[("text", 0)] = 1
    needed = [("latents", 0), ("latents", 1)]
    assert not copies.make_room(100, needed)
    assert all(path.exists() for path in paths)
    assert copies.make_room(100, needed[:1])
    assert [path.exists() for path in paths] == [True, False]


def test_threads_that_need_one_file_fetch_it_once(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(cache)
    copies = LocalCopies(RemoteFolder(server.url), tmp_path / "local", "cache", limit_bytes=1)
    path = copies.tar_path(("latents", 0))
    data = (cache / "latents" / path.name).read_bytes()

    def slow(handler: Any, asked: str, before: int, _: bytes) -> bool:
        time.sleep(0.3)
        return False

    server.misbehave = slow
    sha256 = hashlib.sha256(data).hexdigest()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(copies.fetch, path, len(data), sha256) for _ in range(2)]
        for each in waiting:
            each.result()
    assert server.asked == ["latents/000000.tar"]
    assert path.read_bytes() == data
