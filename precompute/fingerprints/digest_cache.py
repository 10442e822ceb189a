"""Digests of files, remembered by path, size and time, so that no file is hashed twice.

They are kept in the cache's folder. Without them everything is hashed again, and nothing is lost.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.atomic_files import atomic_file

# The file is written whole, so a large one more seldom: that takes a twentieth of the time at most.
SAVE_EVERY_S = 60.0
SAVES_APART = 20  # as many times as long as the last one took
# What each version of this program kept of a file, the present one last.
ENTRIES = [
    np.dtype([("version", "<u8", 2), ("digest", "<u8", 2), ("width", "<u4"), ("height", "<u4")])
]
for _field in ("transparency", "profile"):
    ENTRIES.append(np.dtype([*ENTRIES[-1].descr, (_field, "u1")]))
ENTRY = ENTRIES[-1]
UNKNOWN, NO, YES = range(3)


class Content(NamedTuple):
    """What is known of a file's bytes.

    Attributes:
        digest: XXH3-128.
        width: of an image, upright, in pixels; 0 if the file is no image.
        height: of an image, upright, in pixels; 0 if the file is no image.
        transparency: whether an image may have transparent pixels; former versions did not look.
        profile: whether an image has a colour profile that changes its colours; likewise.
        fault: why an image cannot be used, by its header; such a content is not kept.
    """

    digest: bytes
    width: int = 0
    height: int = 0
    transparency: int = UNKNOWN
    profile: int = UNKNOWN
    fault: str = ""


class DigestCache:
    """Contents by version; a version is a digest of path, size and time, 16 bytes.

    Args:
        path: the file that the contents are kept in.
        keep: whether new contents are written to it.
    """

    def __init__(self, path: Path, *, keep: bool = True) -> None:
        self.path = path
        self.keep = keep
        self._new: dict[bytes, Content] = {}
        self._save_after = time.monotonic() + SAVE_EVERY_S
        self._load()

    @classmethod
    def in_memory(cls) -> "DigestCache":
        """Return one without a file."""
        return cls(Path(os.devnull), keep=False)

    def _load(self) -> None:
        self._entries: NDArray[np.void] = np.empty(0, ENTRY)
        # A damaged file, or one of another version, is ignored: it only saves work.
        with contextlib.suppress(OSError, ValueError, EOFError):
            loaded = np.load(self.path, mmap_mode="r", allow_pickle=False)
            if loaded.dtype == ENTRY and loaded.ndim == 1:
                self._entries = loaded
            elif loaded.dtype in ENTRIES and loaded.ndim == 1:
                self._entries = np.zeros(len(loaded), ENTRY)
                for name in loaded.dtype.names or ():
                    self._entries[name] = loaded[name]
        self._first_halves = np.ascontiguousarray(self._entries["version"][:, 0], np.uint64)

    def find(self, versions: Sequence[bytes | None]) -> list[Content | None]:
        """Return the content of each version, or None where it is not known."""
        contents: list[Content | None] = [None if v is None else self._new.get(v) for v in versions]
        unknown = [at for at, v in enumerate(versions) if v is not None and contents[at] is None]
        if unknown and len(self._entries):
            wanted = np.frombuffer(b"".join(versions[at] or b"" for at in unknown), ">u8")
            wanted = wanted.reshape(-1, 2)
            positions = np.searchsorted(self._first_halves, wanted[:, 0].astype(np.uint64))
            entries = self._entries[np.minimum(positions, len(self._entries) - 1)]
            same = (entries["version"] == wanted).all(axis=1)
            digests = entries["digest"].astype(">u8").tobytes()
            kinds = entries[["width", "height", "transparency", "profile"]].tolist()
            for number, (at, kind) in enumerate(zip(unknown, kinds, strict=True)):
                if same[number]:
                    contents[at] = Content(digests[16 * number : 16 * number + 16], *kind)
        return contents

    def add(self, version: bytes | None, content: Content) -> None:
        """Remember the content of a version, if it has one and is not at fault."""
        if version is not None and not content.fault:
            self._new[version] = content
            if time.monotonic() > self._save_after:
                self.save()

    def save(self) -> None:
        """Write what was added to the file."""
        start = time.monotonic()
        if self.keep and self._new:
            self._merge()
        end = time.monotonic()
        self._save_after = end + max(SAVE_EVERY_S, SAVES_APART * (end - start))

    def _merge(self) -> None:
        self._load()  # what other workers have saved meanwhile stays
        new = np.empty(len(self._new), ENTRY)
        for at, (version, content) in enumerate(self._new.items()):
            halves = np.frombuffer(version + content.digest, ">u8")
            new[at] = (halves[:2], halves[2:], *content[1:-1])
        merged = np.concatenate([np.asarray(self._entries), new])
        # The sort is stable: of two entries with one version the newer is last, and is kept.
        order = np.lexsort((merged["version"][:, 1], merged["version"][:, 0]))
        merged = merged[order]
        last = np.ones(len(merged), bool)
        last[:-1] = (merged["version"][1:] != merged["version"][:-1]).any(axis=1)
        self._write(merged[last])
        self._new.clear()

    def forget(self, version: bytes | None) -> None:
        """Forget the content of a version, which was wrong; the others stay."""
        if version is None or not self.keep:
            return
        self._new.pop(version, None)
        self._load()
        wrong = (self._entries["version"] == np.frombuffer(version, ">u8")).all(axis=1)
        if wrong.any():
            self._write(self._entries[~wrong])

    def _write(self, entries: NDArray[np.void]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path) as file:
            np.save(file, entries, allow_pickle=False)
        self._load()

    @contextlib.contextmanager
    def hashing_lock(self) -> Iterator[None]:
        """Wait until no other worker on this disk hashes files; then load what it has saved.

        A worker that dies releases the lock.
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
        # On a disk without locks some files are hashed twice, which does no harm.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
