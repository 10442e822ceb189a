"""Reading a remote cache through copies on this machine, some shards ahead of their use."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.errors import ShardError
from shards.format import manifest
from shards.format.manifest import MANIFEST, Manifest
from shards.format.sidecar import tar_path
from shards.reading.location import Files, LocalFiles, OpenFile, ShardId, Window
from shards.remote.folder import RemoteFolder, is_url
from shards.remote.local_copies import LocalCopies

LOCAL_CACHE_GB = 64.0
FETCHERS = 4  # files fetched at a time
WINDOWS_HELD = 2  # the one that is read and the next
POLL_S = 1.0  # other processes do not tell when they have made room, nor servers when they are back
OWN_FOLDER = "sd3-controlnet-shards"


def open_files(location: str, cache_dir: Path | None, cache_gb: float) -> Files:
    """Return the files of a cache.

    Args:
        location: a folder, or a URL; see `shards.remote.folder.SCHEMES`.
        cache_dir: for a URL: folder for copies of shards; by default the user's cache folder.
        cache_gb: for a URL: size of the copies, in 10^9 bytes.

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
        remote: the cache.
        cache_dir: where a folder for copies of shards is made; nothing else in it is touched.
        limit_bytes: size of the copies.
    """

    def __init__(self, remote: RemoteFolder, cache_dir: Path, limit_bytes: int) -> None:
        self.remote = remote
        self.limit_bytes = limit_bytes
        data = remote.read(MANIFEST)
        self._manifest = manifest.from_json(data, f"{remote}/{MANIFEST}")
        self._products = dict(self._manifest.products())
        # Another manifest, another folder: no copy is ever out of date.
        name = hashlib.sha256(data).hexdigest()[:16]
        self._copies = LocalCopies(remote, cache_dir / OWN_FOLDER, name, limit_bytes)
        # The windows that are held here: (place at which the window ends, its shards).
        self._windows: list[tuple[int, frozenset[ShardId]]] = []
        self._changed = self._copies.changed
        self._taking = threading.Lock()

    def __str__(self) -> str:
        return str(self.remote)

    def manifest(self) -> Manifest:
        """Return the manifest of the complete cache."""
        return self._manifest

    def check_present(self, manifest: Manifest, folders: Sequence[str]) -> None:
        """Do nothing: a missing file is noticed when it is fetched."""

    def name(self, folder: str, shard: int) -> str:
        """Return the tar's URL."""
        return f"{self.remote}/{folder}/{tar_path(Path(), shard)}"

    def remedy(self, folder: str, shard: int) -> str:
        """Return what to do about a shard that is damaged."""
        return f"delete {self._copies.tar_path((folder, shard))}, and it is fetched again"

    def sidecar(self, folder: str, shard: int) -> bytes:
        """Return the bytes of a shard's sidecar; it is fetched if it is not here.

        Raises:
            ShardError: it cannot be fetched.
            OSError: it cannot be written here.
        """
        sha256 = self._products[folder].sidecar_sha256[shard]
        return self._copies.sidecar((folder, shard), sha256)

    def tar(self, folder: str, shard: int) -> OpenFile:
        """Return a shard's tar, open; it is fetched if it is not here.

        Raises:
            ShardError: it cannot be fetched.
            OSError: it cannot be written here.
        """
        shard_id = folder, shard
        opened = self._copies.opened(shard_id)
        while opened is None:
            self._fetch_tar(shard_id)
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                opened = self._copies.open(shard_id)
        return opened

    def _fetch_tar(self, shard_id: ShardId) -> None:
        folder, shard = shard_id
        path, size = self._copies.tar_path(shard_id), self._size(shard_id)
        if size > self.limit_bytes:
            raise ShardError(
                f"{self.name(folder, shard)}: {size / 1e9:.3g} GB, and --local-cache-gb is "
                f"{self.limit_bytes / 1e9:.3g}"
            )
        if path.exists():
            return
        with self._changed:
            # A reader waits for this tar: shards of the next window can be fetched again. If even
            # their removal does not make room, the limit is exceeded rather than training stopped.
            _ = self._make_room(size) or self._make_room(size, windows=1)
            self._copies.arriving[shard_id] = size
        try:
            self._copies.fetch(path, size, self._products[folder].shard_sha256[shard])
        finally:
            with self._changed:
                self._copies.arriving.pop(shard_id, None)

    def _make_room(self, num_bytes: int, *, windows: int = WINDOWS_HELD) -> bool:
        """Remove shards that the first windows do not need; return whether a file has room."""
        return self._copies.make_room(num_bytes, self._needed(windows))

    def _needed(self, windows: int = WINDOWS_HELD) -> frozenset[ShardId]:
        return frozenset().union(*(shards for _, shards in self._windows[:windows]))

    def _size(self, shard_id: ShardId) -> int:
        folder, shard = shard_id
        return self._products[folder].shard_bytes[shard]

    @contextlib.contextmanager
    def read_ahead(
        self, windows: Iterator[Window], shards_of: Callable[[list[int]], list[ShardId]]
    ) -> Iterator[None]:
        """Fetch the shards of windows in the background, one window ahead of reading."""
        stop = threading.Event()
        upcoming = self._upcoming(windows, shards_of, stop)
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

    def release_before(self, place: int) -> None:
        """Allow the removal of shards that are needed only before a place in the run's order."""
        with self._changed:
            if self._windows and self._windows[0][0] <= place:
                self._windows = [window for window in self._windows if window[0] > place]
                self._copies.close_others(self._needed())

    def _upcoming(
        self,
        windows: Iterator[Window],
        shards_of: Callable[[list[int]], list[ShardId]],
        stop: threading.Event,
    ) -> Iterator[ShardId]:
        """Yield the shards of window after window; wait while `WINDOWS_HELD` windows are held."""
        for end, conditioning_shards in windows:
            with self._changed:
                self._changed.wait_for(lambda: len(self._windows) < WINDOWS_HELD)
            shards: list[ShardId] = []
            while not (shards or stop.is_set()):
                try:
                    shards = shards_of(conditioning_shards)
                except (ShardError, OSError):
                    stop.wait(POLL_S)  # the reader that comes to need them reports the error
            with self._changed:
                if stop.is_set():
                    return
                self._windows.append((end, frozenset(shards)))
            yield from shards

    def _fetch_ahead(self, upcoming: Iterator[ShardId], stop: threading.Event) -> None:
        """Fetch and open upcoming shards; a thread's work."""
        while True:
            with self._taking:
                shard_id = None if stop.is_set() else next(upcoming, None)
            if shard_id is None:
                return
            path, size = self._copies.tar_path(shard_id), self._size(shard_id)
            with self._changed:
                while not (stop.is_set() or path.exists() or self._make_room(size)):
                    self._changed.wait(POLL_S)
            # Errors are reported when a reader comes to need the shard and tries again. Other
            # processes do not remove the tar while it is open.
            if not stop.is_set():
                with contextlib.suppress(ShardError, OSError):
                    self.tar(*shard_id)
