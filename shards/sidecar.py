"""Sidecars: the JSON beside each tar that says it is finished and where its records lie."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import ShardError

FORMAT_VERSION = 1


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
        tar_bytes: size of the tar.
        sha256: of the tar.
        keys: the records' keys, in tar order.
        spans: for each record (offset, size) of its tensors and (offset, size) of its JSON in the
            tar, in bytes, as one list of four numbers.
        prompts: for each latent record the keys of the text records that caption it; empty for
            other products. It is not part of the tar, so that a new caption leaves latents alone.
        skipped: source rows of this shard that were left out.
    """

    shard: int
    fingerprint: str
    tar_bytes: int
    sha256: str
    keys: list[str]
    spans: list[list[int]]
    prompts: list[list[str]]
    skipped: list[Skipped]
    format_version: int = FORMAT_VERSION

    @property
    def num_records(self) -> int:
        """How many records the tar holds."""
        return len(self.keys)


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
    path = sidecar_path(folder, shard)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ShardError(f"{path}: damaged sidecar ({error})") from error
    return from_json(text, path)


def from_json(text: str, path: Path) -> Sidecar:
    """Return the sidecar that a file holds.

    Raises:
        ShardError: as `load`.
    """
    try:
        values: Any = json.loads(text)
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path}: cache format {version}, this version reads {FORMAT_VERSION}; "
                "run precompute again, or install the version that wrote it"
            )
        values["skipped"] = [Skipped(**skipped) for skipped in values["skipped"]]
        sidecar = Sidecar(**values)
        num_records = len(sidecar.keys)
        if len(sidecar.spans) != num_records or len(sidecar.prompts) not in (0, num_records):
            raise ValueError(f"{num_records} keys, {len(sidecar.spans)} spans")
        for span in sidecar.spans:
            start, size, about_start, about_size = span
            inside = start >= 0 and size >= 0 and start + size <= about_start and about_size >= 0
            if not (inside and about_start + about_size <= sidecar.tar_bytes):
                raise ValueError(f"span {span} outside a tar of {sidecar.tar_bytes} bytes")
    except ShardError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"{path}: damaged sidecar ({error}); delete it and run precompute again"
        ) from error
    return sidecar
