"""Sidecars: the JSON beside each tar that says it is finished and where its records lie."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from common.errors import ShardError
from shards.format.json_files import FORMAT_VERSION, Count, Digest, decode, read_file
from shards.format.records import KEY

Span = Annotated[list[Count], Meta(min_length=4, max_length=4)]
LARGEST_CAPTIONS = 256
CHECKSUMS = r"[0-9a-f]{32}"
REMEDY = "delete it and run precompute again"


@dataclass(frozen=True)
class Skipped:
    """A source row that was left out of a shard, and why."""

    row: str
    reason: str


@dataclass(frozen=True)
class Sidecar:
    """What is in one tar; written after it, so that its presence means the tar is whole.

    Attributes:
        shard: number of the shard in its product.
        fingerprint: digest of everything that determines the tar's bytes.
        identity: digest of what a record's bytes depend on besides what it is of; a record of the
            same content and identity may be taken over into a new shard.
        tar_bytes: size of the tar.
        sha256: of the tar.
        keys: the records' keys, in tar order.
        spans: for each record (offset, size) of its tensors and (offset, size) of its JSON in the
            tar, in bytes, as one list of four numbers.
        checksums: for each record XXH3-64 of its tensors' and of its JSON's bytes, 16 hexadecimal
            digits each, so that every read can be checked.
        prompts: for each latent record the keys of the text records that caption it; empty for
            other products. It is not part of the tar, so that a new caption leaves latents alone.
        captions: digest of what `prompts` was made from; empty for other products.
        skipped: source rows of this shard that were left out.
    """

    shard: Count
    fingerprint: str
    identity: str
    tar_bytes: Count
    sha256: Digest
    keys: list[str]
    spans: list[Span]
    checksums: list[str]
    prompts: list[list[str]]
    captions: str
    skipped: list[Skipped]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse lists that do not go together, and records that lie outside the tar.

        Raises:
            ValueError: naming what.
        """
        count = len(self.keys)
        counts = (len(self.spans), len(self.checksums), len(self.prompts) or count)
        if set(counts) != {count}:
            raise ValueError(f"{count} keys, {counts} spans, checksums, prompts")
        _check_all(self.keys, KEY, "key")
        if max(map(len, self.prompts), default=0) > LARGEST_CAPTIONS:
            raise ValueError(f"a record has over {LARGEST_CAPTIONS} prompts")
        _check_all([key for keys in self.prompts for key in keys], KEY, "key")
        _check_all(self.checksums, CHECKSUMS, "pair of checksums")
        last, own = -1, f"{self.shard:06d}-"
        for key in self.keys:
            row = int(key.split("-", 2)[1])
            if row <= last or not key.startswith(own):
                raise ValueError(f"the key {key} is of another shard, or out of order")
            last = row
        end = 0
        for span in self.spans:
            start, size, about_start, about_size = span
            if not end <= start <= start + size <= about_start <= about_start + about_size:
                raise ValueError(f"span {span} is not behind what comes before it")
            end = about_start + about_size
        if end > self.tar_bytes:
            raise ValueError(f"records reach to {end} in a tar of {self.tar_bytes} bytes")

    @property
    def num_records(self) -> int:
        """How many records the tar holds."""
        return len(self.keys)


@dataclass(frozen=True)
class Summary:
    """What tells whether a shard is as planned, without the lists that have an entry a record."""

    shard: Count
    fingerprint: str
    identity: str
    tar_bytes: Count
    captions: str
    skipped: list[Skipped]


def _check_all(strings: list[str], pattern: str, what: str) -> None:
    """Refuse strings of another form; one look at all of them, since there are many."""
    joined = "".join(f"{one}\n" for one in strings)
    count = joined.count("\n")
    if count != len(strings) or not re.fullmatch(rf"({pattern}\n)*", joined):
        wrong = next((one for one in strings if not re.fullmatch(pattern, one)), "")
        raise ValueError(f"{wrong[:80]!r} is not a {what}")


def tar_path(folder: Path, shard: int) -> Path:
    """Return where a product keeps a shard's tar."""
    return folder / f"{shard:06d}.tar"


def sidecar_path(folder: Path, shard: int) -> Path:
    """Return where a product keeps a shard's sidecar."""
    return folder / f"{shard:06d}.json"


def to_json(sidecar: Sidecar) -> str:
    """Return the text of a sidecar file."""
    return json.dumps(dataclasses.asdict(sidecar), ensure_ascii=False, indent=0) + "\n"


def load(folder: Path, shard: int) -> Sidecar | None:
    """Return a shard's sidecar, or None where there is none yet.

    Raises:
        ShardError: there is one, but it is damaged or of another format version.
    """
    data = _read(folder, shard)
    return None if data is None else from_json(data, shard, sidecar_path(folder, shard))


def summary(folder: Path, shard: int) -> Summary | None:
    """Return what a shard's sidecar says in short, or None where it is not there or no use.

    None also where its tar is missing or has another size.
    """
    try:
        data = _read(folder, shard)
        if data is None:
            return None
        found = decode(data, Summary, sidecar_path(folder, shard), REMEDY)
        size = tar_path(folder, shard).stat().st_size
    except (ShardError, OSError):
        return None
    return found if (found.shard, found.tar_bytes) == (shard, size) else None


def _read(folder: Path, shard: int) -> bytes | None:
    try:
        return read_file(sidecar_path(folder, shard))
    except FileNotFoundError:
        return None


def from_json(data: bytes, shard: int, where: object) -> Sidecar:
    """Return the sidecar that a file's bytes hold.

    Args:
        data: the bytes.
        shard: the shard whose sidecar this should be.
        where: for the error.

    Raises:
        ShardError: it is damaged, of another shard or of another format version.
    """
    found = decode(data, Sidecar, where, REMEDY)
    if found.shard != shard:
        raise ShardError(f"{where}: the sidecar of shard {found.shard:06d} under another's name")
    return found
