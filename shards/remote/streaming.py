"""A remote cache read through a bounded folder of this machine, some shards ahead of their use.

Several processes may share the folder: of those that want a shard one fetches it, and none removes
what another has open.
"""

import contextlib
import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.errors import ShardError
from shards.format import json_files, manifest
from shards.format.manifest import MANIFEST, Manifest
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.location import OPEN_FILES, Files, LocalFiles, OpenFile, Shard, Window
from shards.remote.folder import RemoteFolder, is_url

LOCAL_CACHE_GB = 64.0
FETCHERS = 4  # files on their way at a time
WINDOWS_HELD = 2  # the one that is read and the next
POLL_S = 1.0  # other processes do not tell when they have made room, nor servers when they are back
OWN_FOLDER = "sd3-controlnet-shards"


def open_files(location: str, cache_dir: Path | None, cache_gb: float) -> Files:
    """Return where a cache's files are.

    Args:
        location: a folder, or a URL; see `shards.remote.folder.SCHEMES`.
        cache_dir: for a URL: where shards are kept; by default among the user's caches.
        cache_gb: for a URL: how many 10^9 bytes of them.

    Raises:
        ConfigError: an address of another kind.
        OSError: `cache_dir` cannot be made.
    """
    if not is_url(location):
        return LocalFiles(Path(location))
    return RemoteFiles(RemoteFolder(location), cache_dir or _user_cache(), int(cache_gb * 1e9))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


class RemoteFiles:
    """A cache behind a URL.

    Args:
        remote: where it is.
        cache_dir: where a folder for shards is made; nothing else in it is touched.
        limit_bytes: how much of them.
    """

    def __init__(self, remote: RemoteFolder, cache_dir: Path, limit_bytes: int) -> None:
        self.remote = remote
        self.limit_bytes = limit_bytes
        data = remote.read(MANIFEST)
        self._manifest = manifest.from_json(data, f"{remote}/{MANIFEST}")
        self._products = dict(self._manifest.products())
        # Another manifest, another folder: nothing here is ever out of date.
        self.kept = cache_dir / OWN_FOLDER
        self.root = self.kept / hashlib.sha256(data).hexdigest()[:16]
        self.root.mkdir(parents=True, exist_ok=True)
        self._open: OrderedDict[Shard, SharedFile] = OrderedDict()
        self._windows: list[tuple[int, frozenset[Shard]]] = []
        self._on_their_way: dict[Shard, int] = {}
        self._changed = threading.Condition()
        self._taking = threading.Lock()

    def __str__(self) -> str:
        return str(self.remote)

    def manifest(self) -> Manifest:
        """Return the manifest of the complete cache."""
        return self._manifest

    def check_present(self, found: Manifest, folders: Sequence[str]) -> None:
        """Files are missed when they are fetched."""

    def name(self, folder: str, shard: int) -> str:
        """Return the tar's URL."""
        return f"{self.remote}/{folder}/{tar_path(Path(), shard)}"

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar.

        Raises:
            ShardError: it cannot be had.
            OSError: it cannot be kept.
        """
        path = sidecar_path(self.root / folder, shard)
        expected = self._products[folder].sidecar_sha256[shard]
        while True:
            self._fetch(path, None, expected)
            with contextlib.suppress(FileNotFoundError):  # if another process was quicker
                data = json_files.read_file(path)
                if hashlib.sha256(data).hexdigest() == expected:
                    return data
                path.unlink()  # damaged here; what comes is checked before it gets this name

    def tar(self, folder: str, shard: int) -> OpenFile:
        """Return a shard's tar, open; it is fetched where it is not here.

        Raises:
            ShardError: it cannot be had.
            OSError: it cannot be kept.
        """
        wanted = folder, shard
        with self._changed:
            if wanted in self._open:
                self._open.move_to_end(wanted)
                return self._open[wanted]
        path = tar_path(self.root / folder, shard)
        while True:
            self._fetch_tar(wanted)
            with contextlib.suppress(FileNotFoundError):  # if another process was quicker
                file = SharedFile(path)
                with self._changed:
                    self._open[wanted] = file
                    while len(self._open) > OPEN_FILES:
                        self._open.popitem(last=False)
                return file

    def remedy(self, folder: str, shard: int) -> str:
        """Return what to do about a shard that is damaged."""
        path = tar_path(self.root / folder, shard)
        return f"delete {path}, and it is fetched again"

    @contextlib.contextmanager
    def following(
        self, windows: Iterator[Window], needed: Callable[[list[int]], list[Shard]]
    ) -> Iterator[None]:
        """Fetch, in the background, what the windows read, one window ahead.

        Args:
            windows: in order; taken as they are needed, from other threads.
            needed: returns what the samples of some conditioning shards are in.
        """
        stop = threading.Event()
        upcoming = self._upcoming(windows, needed, stop)
        for number in range(FETCHERS):
            threading.Thread(
                target=self._fetch_ahead, args=(upcoming, stop), name=f"fetch-{number}", daemon=True
            ).start()
        try:
            yield
        finally:
            stop.set()
            self.remote.give_up()
            with self._changed:
                self._windows.clear()
                self._changed.notify_all()

    def reached(self, place: int) -> None:
        """Let go of what is read only before a place in the run's order."""
        with self._changed:
            if self._windows and self._windows[0][0] <= place:
                while self._windows and self._windows[0][0] <= place:
                    self._windows.pop(0)
                needed = frozenset().union(*(files for _, files in self._windows))
                for shard in self._open.keys() - needed:  # other processes may remove them now
                    del self._open[shard]
                self._changed.notify_all()

    def _upcoming(
        self,
        windows: Iterator[Window],
        needed: Callable[[list[int]], list[Shard]],
        stop: threading.Event,
    ) -> Iterator[Shard]:
        for end, shards in windows:
            with self._changed:
                self._changed.wait_for(lambda: len(self._windows) < WINDOWS_HELD)
            files: list[Shard] = []
            while not (files or stop.is_set()):
                try:
                    files = needed(shards)
                except (ShardError, OSError):
                    stop.wait(POLL_S)  # whoever comes to need these reports what is wrong
            with self._changed:
                if stop.is_set():
                    return
                self._windows.append((end, frozenset(files)))
            yield from files

    def _fetch_ahead(self, upcoming: Iterator[Shard], stop: threading.Event) -> None:
        while True:
            with self._taking:
                wanted = None if stop.is_set() else next(upcoming, None)
            if wanted is None:
                return
            path = tar_path(self.root / wanted[0], wanted[1])
            with self._changed:
                while not (stop.is_set() or path.exists() or self._make_room(self._size(wanted))):
                    self._changed.wait(POLL_S)
            # What fails is tried again, and reported, by whoever comes to need it. Opened, it is
            # safe from other processes.
            if not stop.is_set():
                with contextlib.suppress(ShardError, OSError):
                    self.tar(*wanted)

    def _fetch_tar(self, wanted: Shard) -> None:
        """Have a tar here, whole."""
        folder, shard = wanted
        path, size = tar_path(self.root / folder, shard), self._size(wanted)
        if size > self.limit_bytes:
            raise ShardError(
                f"{self.name(folder, shard)}: {size / 1e9:.3g} GB, and --local-cache-gb is "
                f"{self.limit_bytes / 1e9:.3g}"
            )
        if not path.exists():
            with self._changed:
                # Somebody waits for it: what the next window needs can be fetched again, and where
                # even that does not make room, the bound is passed rather than training stopped.
                _ = self._make_room(size) or self._make_room(size, windows=1)
                self._on_their_way[wanted] = size
            try:
                self._fetch(path, size, self._products[folder].shard_sha256[shard])
            finally:
                with self._changed:
                    self._on_their_way.pop(wanted, None)

    def _fetch(self, path: Path, size: int | None, sha256: str) -> None:
        """Have a file here, whole; one process or thread at a time fetches it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(f"{path.suffix}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                for left in path.parent.glob(f"{path.name}.*.part"):  # by a process that was killed
                    left.unlink(missing_ok=True)
                name = path.relative_to(self.root).as_posix()
                self.remote.fetch(name, path, size=size, sha256=sha256)

    def _size(self, wanted: Shard) -> int:
        return self._products[wanted[0]].shard_bytes[wanted[1]]

    def _make_room(self, num_bytes: int, *, windows: int = WINDOWS_HELD) -> bool:
        """Remove what the first windows do not need, oldest first, until a file fits.

        Returns:
            Whether it does.
        """
        needed = {
            tar_path(self.root / folder, shard)
            for _, shards in self._windows[:windows]
            for folder, shard in shards
        }
        kept: list[tuple[float, int, Path]] = []
        for path in self.kept.rglob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                kept.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in kept) + sum(self._on_their_way.values())
        for _, size, path in sorted(kept):
            if total + num_bytes <= self.limit_bytes:
                break
            if path not in needed and self._remove(path):
                total -= size
        return total + num_bytes <= self.limit_bytes

    def _remove(self, path: Path) -> bool:
        """Remove a shard unless somebody reads it; tell whether it is gone."""
        with contextlib.suppress(ValueError):
            folder = path.parent.relative_to(self.root).as_posix()
            self._open.pop((folder, int(path.stem)), None)
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
            return True
        return False


class SharedFile(OpenFile):
    """An open file that other processes see to be in use.

    Raises:
        FileNotFoundError: it is not there, or is being removed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        if os.fstat(self.descriptor).st_nlink == 0:
            raise FileNotFoundError(path)
        os.utime(self.descriptor)
