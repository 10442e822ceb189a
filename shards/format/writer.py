"""Writing shards: equal records give equal bytes, and no half-written shard passes for a whole one.

Order of commitment: the tar under a temporary name, fsync, rename; then its sidecar likewise. The
manifest (see `shards.format.manifest`) comes last of all.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from xxhash import xxh3_64_hexdigest

from common.atomic_files import atomic_file, sync_folder, write_text
from common.errors import ShardError
from shards.format.members import SUFFIXES, Members
from shards.format.records import Record, to_members
from shards.format.sidecar import Sidecar, Skipped, sidecar_path, tar_path, to_json


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

    An older shard of this number stays until the new tar is whole.

    Args:
        folder: the product's folder; made if missing.
        shard: number of the shard.
        records: consumed one by one. `skipped` and `prompts` may grow meanwhile: they are read
            after the last record.
        fingerprint: digest of everything that determines the tar's bytes.
        identity: digest of what a record's bytes depend on besides its content.
        skipped: source rows that were left out.
        prompts: for latents, the keys of the text records that caption each record.
        captions: for latents, digest of what `prompts` was made from.
        num_bytes: approximate size of the tar; nothing is written if the disk has less room.

    Raises:
        ShardError: the keys are not this shard's, in the order of their slots.
        OSError: the disk is full or the folder cannot be written; finished shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = tar_path(folder, shard)
    with atomic_file(path, num_bytes) as file:
        tar = _write_tar(file, records)
        try:
            sidecar = Sidecar(
                shard=shard,
                fingerprint=fingerprint,
                identity=identity,
                tar_bytes=file.tell(),
                sha256=tar.sha256,
                keys=tar.keys,
                spans=tar.spans,
                checksums=tar.checksums,
                prompts=prompts or [],
                captions=captions,
                skipped=skipped or [],
            )
        except ValueError as error:
            raise ShardError(f"{path}: {error}") from error
        _remove_sidecar(folder, shard)
    write_sidecar(folder, sidecar)
    return sidecar


def write_sidecar(folder: Path, sidecar: Sidecar) -> None:
    """Write, or replace, a shard's sidecar."""
    write_text(sidecar_path(folder, sidecar.shard), to_json(sidecar))


def _remove_sidecar(folder: Path, shard: int) -> None:
    """Remove the older shard's sidecar: it must not vouch for the new tar."""
    with contextlib.suppress(FileNotFoundError):
        sidecar_path(folder, shard).unlink()
        sync_folder(folder)


class _HashingFile(io.RawIOBase):
    """A file that hashes what is written to it, so that a tar need not be read again."""

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


@dataclass
class _TarContents:
    """What a sidecar says of its tar; the lists have one entry a record, as in `Sidecar`."""

    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    spans: list[list[int]] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)


def _write_tar(file: IO[bytes], records: Iterable[Record | Members]) -> _TarContents:
    contents = _TarContents()
    hashing = _HashingFile(file)
    with tarfile.open(fileobj=hashing, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            key, *members = record if isinstance(record, Members) else to_members(record)
            contents.keys.append(key)
            span: list[int] = []
            for suffix, data in zip(SUFFIXES, members, strict=True):
                span += _add_member(tar, key + suffix, data)
            contents.spans.append(span)
            contents.checksums.append("".join(map(xxh3_64_hexdigest, members)))
    contents.sha256 = hashing.sha256.hexdigest()
    return contents


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[int, int]:
    """Append a member with no trace of time, owner or machine; return offset and size of `data`."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    start = tar.offset + tarfile.BLOCKSIZE  # a USTAR header of a short name is one block
    tar.addfile(member, io.BytesIO(data))
    return start, len(data)
