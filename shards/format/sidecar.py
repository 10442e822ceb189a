"""Sidecars: the JSON file beside each tar; it marks the tar as finished and locates its records."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from common.errors import ShardError
from shards.format.json_files import FORMAT_VERSION, Count, Digest, decode, read_file
from shards.format.keys import KEY, slot_of

Span = Annotated[list[Count], Meta(min_length=4, max_length=4)]
LARGEST_CAPTIONS = 256
CHECKSUMS = r"[0-9a-f]{32}"
# What a record takes in a sidecar at most: a key, four numbers, two checksums. And a prompt of it.
SIDECAR_BYTES_A_RECORD, SIDECAR_BYTES_A_PROMPT = 160, 48
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
        identity: digest of what a record's bytes depend on besides its content; a record of the
            same content and identity may be copied into a new shard.
        tar_bytes: size of the tar.
        sha256: of the tar.
        keys: the records' keys, in tar order.
        spans: for each record four numbers in bytes: offset and size of its tensors in the tar,
            offset and size of its metadata.
        checksums: for each record XXH3-64 of its tensors' and of its metadata's bytes, 16
            hexadecimal digits each, so that every read can be checked.
        prompts: for each latent record the keys of the text records that caption it; empty for
            other products. It is not part of the tar, so that a new caption does not change the
            tar.
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
            ValueError: naming the lists or records.
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
        self._check_slots()
        self._check_spans()

    def _check_slots(self) -> None:
        last, own = -1, f"{self.shard:06d}-"
        for key in self.keys:
            _, slot = slot_of(key)
            if slot <= last or not key.startswith(own):
                raise ValueError(f"the key {key} is of another shard, or out of order")
            last = slot

    def _check_spans(self) -> None:
        end = 0
        for span in self.spans:
            start, size, metadata_start, metadata_size = span
            metadata_end = metadata_start + metadata_size
            if not end <= start <= start + size <= metadata_start <= metadata_end:
                raise ValueError(f"span {span} is not behind what comes before it")
            end = metadata_end
        if end > self.tar_bytes:
            raise ValueError(f"records reach to {end} in a tar of {self.tar_bytes} bytes")

    @property
    def num_records(self) -> int:
        """How many records the tar holds."""
        return len(self.keys)


@dataclass(frozen=True)
class Summary:
    """A sidecar without the lists that have an entry a record; enough to compare shards."""

    shard: Count
    fingerprint: str
    identity: str
    tar_bytes: Count
    captions: str
    skipped: list[Skipped]


def _check_all(strings: list[str], pattern: str, what: str) -> None:
    """Refuse strings of another form; all are matched at once, since there are many."""
    joined = "".join(f"{string}\n" for string in strings)
    count = joined.count("\n")
    if count != len(strings) or not re.fullmatch(rf"({pattern}\n)*", joined):
        wrong = next((string for string in strings if not re.fullmatch(pattern, string)), "")
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


def load_present(folder: Path, shard: int) -> Sidecar:
    """Return a shard's sidecar.

    Raises:
        ShardError: there is none, or it is damaged or of another format version.
    """
    if (loaded := load(folder, shard)) is None:
        raise ShardError(f"{folder}: the sidecar of shard {shard:06d} is missing")
    return loaded


def load_summary(folder: Path, shard: int) -> Summary | None:
    """Return the summary of a finished shard, or None if the shard must be written again.

    That is, if its sidecar is missing or damaged, or its tar is missing or has another size.
    """
    try:
        data = _read(folder, shard)
        if data is None:
            return None
        summary = decode(data, Summary, sidecar_path(folder, shard), REMEDY)
        size = tar_path(folder, shard).stat().st_size
    except (ShardError, OSError):
        return None
    return summary if (summary.shard, summary.tar_bytes) == (shard, size) else None


def _read(folder: Path, shard: int) -> bytes | None:
    try:
        return read_file(sidecar_path(folder, shard))
    except FileNotFoundError:
        return None


def from_json(data: bytes, shard: int, where: object) -> Sidecar:
    """Return the sidecar that a file's bytes hold.

    Args:
        data: the file's bytes.
        shard: number of the shard that this should be the sidecar of.
        where: the file's path or address, for the error.

    Raises:
        ShardError: it is damaged, of another shard or of another format version.
    """
    sidecar = decode(data, Sidecar, where, REMEDY)
    if sidecar.shard != shard:
        raise ShardError(f"{where}: the sidecar of shard {sidecar.shard:06d} under another's name")
    return sidecar
