"""Writing shards: equal records give equal bytes, and no half-written shard passes for a whole one.

Order of commitment: the tar under a temporary name, fsync, rename; then its sidecar likewise. The
manifest (see `shards.manifest`) comes last of all.
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from shards.errors import ShardError
from shards.records import Record, to_bytes
from shards.sidecar import Sidecar, Skipped, sidecar_path, tar_path, to_json


class _HashingFile(io.RawIOBase):
    """A file that hashes what passes through it, so that a tar is read from disk no second time."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)


def write_shard(
    folder: Path,
    shard: int,
    records: Iterable[Record],
    *,
    fingerprint: str,
    skipped: list[Skipped] | None = None,
    prompts: list[list[str]] | None = None,
) -> Sidecar:
    """Write a shard's tar and then its sidecar, replacing both at once where they exist.

    Args:
        folder: the product's folder; made if missing.
        shard: number of the shard.
        records: consumed one by one; a list that is still being filled (`skipped`, `prompts`) is
            read after the last of them.
        fingerprint: digest of everything that determines the tar's bytes.
        skipped: rows left out.
        prompts: for latents, the text records that caption each record.

    Raises:
        ShardError: the records repeat a key.
        OSError: the disk is full or the folder cannot be written; finished shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The old sidecar must not vouch for the new tar.
    sidecar_path(folder, shard).unlink(missing_ok=True)
    keys: list[str] = []
    spans: list[list[int]] = []
    path = tar_path(folder, shard)
    with atomic_file(path) as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                keys.append(record.key)
                tensors, about = to_bytes(record)
                spans.append(
                    [
                        *_add(tar, f"{record.key}.safetensors", tensors),
                        *_add(tar, f"{record.key}.json", about),
                    ]
                )
        tar_bytes = file.tell()
    if len(set(keys)) != len(keys):
        path.unlink()
        raise ShardError(f"{path}: two records with the same key")
    sidecar = Sidecar(
        shard=shard,
        fingerprint=fingerprint,
        tar_bytes=tar_bytes,
        sha256=hashing.sha256.hexdigest(),
        keys=keys,
        spans=spans,
        prompts=prompts or [],
        skipped=skipped or [],
    )
    write_sidecar(folder, sidecar)
    return sidecar


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write, or replace, a shard's sidecar."""
    write_text(sidecar_path(folder, sidecar.shard), to_json(sidecar))


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file under a temporary name; on success it is synced and renamed to `path`.

    On any exception the temporary file goes and `path` is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append a member with no trace of time, owner or machine; return where its data lies."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    start = tar.offset + tarfile.BLOCKSIZE  # a USTAR header of a short name is one block
    tar.addfile(member, io.BytesIO(data))
    return start, len(data)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; systems that cannot open a folder do so by themselves."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
