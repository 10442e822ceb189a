"""Writing shards: equal records give equal bytes, and no half-written shard passes for a whole one.

Order of commitment: the tar under a temporary name, fsync, rename; then its sidecar likewise. The
manifest (see `shards.manifest`) comes last of all.
"""

import contextlib
import errno
import hashlib
import io
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from xxhash import xxh3_64_hexdigest

from shards.errors import ShardError
from shards.records import Members, Record, to_members
from shards.sidecar import Sidecar, Skipped, sidecar_path, tar_path, to_json

MEMBERS = (".safetensors", ".json")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    records: Iterable[Record | Members],
    *,
    fingerprint: str,
    identity: str = "",
    skipped: list[Skipped] | None = None,
    prompts: list[list[str]] | None = None,
    captions: str = "",
    num_bytes: int = 0,
) -> Sidecar:
    """Write a shard's tar and then its sidecar.

    Where there is such a shard it stands until the new tar is whole.

    Args:
        folder: the product's folder; made if missing.
        shard: number of the shard.
        records: consumed one by one; a list that is still being filled (`skipped`, `prompts`) is
            read after the last of them.
        fingerprint: digest of everything that determines the tar's bytes.
        identity: see `Sidecar`.
        skipped: rows left out.
        prompts: for latents, the text records that caption each record.
        captions: see `Sidecar`.
        num_bytes: about how large the tar will be; it is not begun where that does not fit.

    Raises:
        ShardError: the keys are not this shard's, in the order of their rows.
        OSError: the disk is full or the folder cannot be written; finished shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    spans: list[list[int]] = []
    checksums: list[str] = []
    path = tar_path(folder, shard)
    with atomic_file(path, num_bytes) as file:
        hashing = _HashingFile(file)
        with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for record in records:
                key, *members = record if isinstance(record, Members) else to_members(record)
                keys.append(key)
                spans.append(
                    [
                        number
                        for kind, data in zip(MEMBERS, members, strict=True)
                        for number in _add(tar, key + kind, data)
                    ]
                )
                checksums.append("".join(map(xxh3_64_hexdigest, members)))
        try:
            sidecar = Sidecar(
                shard=shard,
                fingerprint=fingerprint,
                identity=identity,
                tar_bytes=file.tell(),
                sha256=hashing.sha256.hexdigest(),
                keys=keys,
                spans=spans,
                checksums=checksums,
                prompts=prompts or [],
                captions=captions,
                skipped=skipped or [],
            )
        except ValueError as error:
            raise ShardError(f"{path}: {error}") from error
        # The old sidecar must not vouch for the new tar.
        with contextlib.suppress(FileNotFoundError):
            sidecar_path(folder, shard).unlink()
            _sync_folder(folder)
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
def atomic_file(path: Path, num_bytes: int = 0) -> Iterator[IO[bytes]]:
    """Give a file under a temporary name; on success it is synced and renamed to `path`.

    On any exception the temporary file goes and `path` is as it was.

    Args:
        path: the file to write or replace.
        num_bytes: about how large it will be, if that is known.

    Raises:
        OSError: it cannot be written, or will not fit; with the path and the space needed.
    """
    # No other process has this name, on this machine or another that shares the disk.
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        if num_bytes > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with temporary.open("wb") as file:
            yield file
            file.flush()
        move_into_place(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise cannot_write(path, error, num_bytes) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what does not fit the disk.

    Raises:
        OSError: with the folder and the space needed.
    """
    if num_bytes > shutil.disk_usage(folder).free:
        raise cannot_write(folder, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), num_bytes)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a finished file to its own name, so that it is there whole even if power fails now."""
    _sync(temporary)
    temporary.replace(path)
    _sync_folder(path.parent)


def cannot_write(path: Path, error: OSError, num_bytes: int) -> OSError:
    """Return an error that names the file and, where the disk is full, the space it takes.

    Args:
        path: the file that was to be written.
        error: why it could not.
        num_bytes: about how large it would be; 0 if that is not known.
    """
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        needed = f"about {num_bytes / 1e6:.1f} MB needed, " if num_bytes else ""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
            reason += f" ({needed}{free / 1e6:.1f} MB free); make room and run again"
    return OSError(error.errno, f"cannot write: {reason}", str(path))


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
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
