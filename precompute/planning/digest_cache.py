"""Digests of contents, remembered by path, size and time, so that no file is hashed twice.

They lie in the cache's folder; without them everything is hashed again, no more.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.atomic_files import atomic_file

SAVE_EVERY_S = 60.0
ENTRY = np.dtype([("version", "<u8", 2), ("digest", "<u8", 2), ("width", "<u4"), ("height", "<u4")])


class Content(NamedTuple):
    """What is known of a file's bytes.

    Attributes:
        digest: XXH3-128.
        width: of an image, upright, in pixels; 0 if it is none.
        height: likewise.
    """

    digest: bytes
    width: int = 0
    height: int = 0


class DigestCache:
    """Contents by version; a version is a digest of path, size and time, 16 bytes.

    Args:
        path: of the file that they are kept in.
        keep: whether what is learnt is written there.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self.path = path
        self.keep = keep
        self._new: dict[bytes, Content] = {}
        self._saved_at = time.monotonic()
        self._load()

    def _load(self) -> None:
        self._entries: NDArray[np.void] = np.empty(0, ENTRY)
        # Damaged, or of another time: it only saves work.
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if found.dtype == ENTRY and found.ndim == 1:
                self._entries = found
        self._firsts = np.ascontiguousarray(self._entries["version"][:, 0], np.uint64)

    def find(self, versions: Sequence[bytes | None]) -> list[Content | None]:
        """Return what is known of each version."""
        found: list[Content | None] = [None if v is None else self._new.get(v) for v in versions]
        asked = [at for at, v in enumerate(versions) if v is not None and found[at] is None]
        if asked and len(self._entries):
            wanted = np.frombuffer(b"".join(versions[at] or b"" for at in asked), ">u8")
            wanted = wanted.reshape(-1, 2)
            places = np.searchsorted(self._firsts, wanted[:, 0].astype(np.uint64))
            entries = self._entries[np.minimum(places, len(self._entries) - 1)]
            same = (entries["version"] == wanted).all(axis=1)
            digests = entries["digest"].astype(">u8").tobytes()
            sizes = zip(entries["width"].tolist(), entries["height"].tolist(), strict=True)
            for row, (at, size) in enumerate(zip(asked, sizes, strict=True)):
                if same[row]:
                    found[at] = Content(digests[16 * row : 16 * row + 16], *size)
        return found

    def add(self, version: bytes | None, content: Content) -> None:
        """Remember a content; None is passed over."""
        if version is not None:
            self._new[version] = content
            if time.monotonic() - self._saved_at > SAVE_EVERY_S:
                self.save()

    def save(self) -> None:
        """Write what was added to the file."""
        self._saved_at = time.monotonic()
        if not (self.keep and self._new):
            return
        new = np.empty(len(self._new), ENTRY)
        for at, (version, content) in enumerate(self._new.items()):
            halves = np.frombuffer(version + content.digest, ">u8")
            new[at] = (halves[:2], halves[2:], content.width, content.height)
        merged = np.concatenate([np.asarray(self._entries), new])
        # Stable: of two with one version the later is last, and only the last is kept.
        order = np.lexsort((merged["version"][:, 1], merged["version"][:, 0]))
        merged = merged[order]
        last = np.ones(len(merged), bool)
        last[:-1] = (merged["version"][1:] != merged["version"][:-1]).any(axis=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            np.save(file, merged[last], allow_pickle=False)
        self._new.clear()
        self._load()

    def forget(self) -> None:
        """Forget everything: a file was not what it was remembered as."""
        if self.keep:
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def hashing_alone(self) -> Iterator[None]:
        """Wait until no other worker on this disk hashes; then know what it has found.

        A worker that dies lets go of the lock.
        """
        if not self.keep:
            yield
            return
        with _locked(self.path.with_name(f"{self.path.name}.lock")):
            self._load()
            yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this machine and, where its disk has locks, of others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        # No fcntl, or a disk without locks: then some files are hashed twice, no more.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
