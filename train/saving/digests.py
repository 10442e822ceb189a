"""Sizes and digests of a checkpoint's files: taken when it is written, held against it later.

A digest is XXH3's, at 4 to 9 GB/s a core: what is just written or about to be loaded is read from
memory, so a checkpoint of 32 GB takes some seconds more.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from xxhash import xxh3_128

NUM_THREADS = 8
ZIPPED = {".bin", ".pt", ".pth"}  # as torch.save writes them


@dataclass(frozen=True)
class FileDigest:
    """What a file holds.

    Attributes:
        num_bytes: its size.
        xxh3_128: its digest, in hex.
    """

    num_bytes: int
    xxh3_128: str


def file_names(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, relative to it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def deal(seen: Sequence[Sequence[str]]) -> list[list[str]]:
    """Deal files out to processes: each file to one that sees it, in turn.

    A disk of several machines may show a new file at first only to the machine that wrote it.

    Args:
        seen: the names that each process sees.
    """
    dealt: list[list[str]] = [[] for _ in seen]
    for number, name in enumerate(sorted(set().union(*seen))):
        ranks = [rank for rank, names in enumerate(seen) if name in names]
        dealt[ranks[number % len(ranks)]].append(name)
    return dealt


def digest_files(folder: Path, names: Sequence[str]) -> dict[str, FileDigest]:
    """Return the digests of some files in a folder, by name.

    Raises:
        OSError: one cannot be read.
    """
    with ThreadPoolExecutor(NUM_THREADS, "digest") as pool:
        digests = pool.map(lambda name: _digest(folder / name), names)
        return dict(zip(names, digests, strict=True))


def find_change(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """Return which file differs from what was written, and how, in one line; None if none does.

    Args:
        folder: of a checkpoint.
        files: what was written, by name.
    """
    for name, written in files.items():  # at once, before anything is read
        path = folder / name
        if not path.is_file():
            return f"{path}: is missing"
        if (size := path.stat().st_size) != written.num_bytes:
            found = f"holds {size} bytes, {written.num_bytes} were written"
            return f"{path}: {found if size else 'is empty'}"
    try:
        found_digests = digest_files(folder, list(files))
    except OSError as error:
        return f"{error.filename or folder}: cannot be read ({error.strerror})"
    for name, written in files.items():
        if found_digests[name] != written:
            return f"{folder / name}: does not hold the bytes that were written"
    return None


def find_cut(folder: Path) -> str | None:
    """Return which file in a folder ends early, in one line, by what files of its kind look like.

    For checkpoints that say nothing of their files.
    """
    for name in file_names(folder):
        path = folder / name
        if not path.stat().st_size:
            return f"{path}: is empty"
        if not _looks_whole(path):
            return f"{path}: is cut short"
    return None


def _digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, xxh3_128).hexdigest()
        return FileDigest(file.tell(), digest)


def _looks_whole(path: Path) -> bool:
    if path.suffix in ZIPPED:
        return zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return False
    return True
