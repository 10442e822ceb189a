"""Writing shards: equal records give equal bytes, and no half-written shard passes for a whole one.

Order of commitment: the tar under a temporary name, fsync, rename; then its sidecar likewise. The
manifest (see `shards.format.manifest`) comes last of all.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from xxhash import xxh3_64_hexdigest

from common.atomic_files import atomic_file, sync_folder, write_text
from common.errors import ShardError
from shards.format.records import Members, Record, to_members
from shards.format.sidecar import Sidecar, Skipped, sidecar_path, tar_path, to_json

MEMBERS = (".safetensors", ".json")


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
            sync_folder(folder)
    write_sidecar(folder, sidecar)
    return sidecar


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write, or replace, a shard's sidecar."""
    write_text(sidecar_path(folder, sidecar.shard), to_json(sidecar))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append a member with no trace of time, owner or machine; return where its data lies."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    start = tar.offset + tarfile.BLOCKSIZE  # a USTAR header of a short name is one block
    tar.addfile(member, io.BytesIO(data))
    return start, len(data)
