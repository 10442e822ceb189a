"""The expected cache: what a cache must hold to be complete, written down before it is made.

Stage 1 writes it to `plan.safetensors`, with arrays of its own. A process that finds
every shard as expected seals the cache; see `shards.format.seal`.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from common.atomic_files import atomic_file
from common.errors import ShardError
from shards.format.json_files import FORMAT_VERSION, Count, decode, plain
from shards.format.sidecar import load_summary
from shards.format.specs import AnnotatorSpec, ConditioningSpec, LatentSpec, TextSpec

PLAN = "plan.safetensors"
LISTED_SHARDS = 8


@dataclass(frozen=True)
class ExpectedProduct:
    """What a product's shards must be; the lists have one entry a shard.

    Attributes:
        identity: what a record's bytes depend on besides its content; plain JSON values.
        fingerprints: of the sidecars.
        captions: of the latents' sidecars; empty for other products.
        shard_buckets: index of each shard's bucket in `ExpectedCache.buckets`; empty for text.
    """

    identity: dict[str, Any]
    fingerprints: list[str]
    captions: list[str]
    shard_buckets: list[Count]

    def missing(self, folder: Path) -> list[int]:
        """Return the shards that are missing in a folder or differ from what is expected."""
        return [
            shard for shard in range(len(self.fingerprints)) if not self._is_there(folder, shard)
        ]

    def _is_there(self, folder: Path, shard: int) -> bool:
        summary = load_summary(folder, shard)
        if summary is None or summary.fingerprint != self.fingerprints[shard]:
            return False
        return not self.captions or summary.captions == self.captions[shard]


@dataclass(frozen=True)
class ExpectedCache:
    """What a cache must hold to be complete.

    Attributes:
        products: by folder.
        conditioning_name: the control that is made; other controls in the cache stay if they can.
        text_spec: shapes of the text records.
        latent_spec: meaning of the latents.
        conditioning_spec: meaning of the conditioning latents.
        buckets: shapes of the latent grids.
        held_out: shards of latents that training leaves out; ascending.
        made_by: versions and base model, for people.
        num_rows: of the source; 0 in a plan that does not say it.
        num_images: how many latents there are if every row can be used.
        images_per_row: how many latents a row has that is trained on; 0 in a plan that does not say
            it, whose rows have equally many.
        num_held_out: how many of the rows are held out of training; they may have fewer latents.
        max_bad_fraction: how much of the rows may be left out.
        annotator: what draws the conditioning images; None if the source has them.
    """

    products: dict[str, ExpectedProduct]
    conditioning_name: str
    text_spec: TextSpec
    latent_spec: LatentSpec
    conditioning_spec: ConditioningSpec
    buckets: list[tuple[int, int]]
    held_out: list[Count]
    made_by: dict[str, Any]
    num_rows: Count = 0
    num_images: Count = 0
    images_per_row: Count = 0
    num_held_out: Count = 0
    max_bad_fraction: float = 1.0
    annotator: AnnotatorSpec | None = None
    format_version: int = FORMAT_VERSION

    def missing(self, cache: Path) -> dict[str, list[int]]:
        """Return the missing shards of each product that lacks some, by folder."""
        missing = {
            folder: product.missing(cache / folder) for folder, product in self.products.items()
        }
        return {folder: shards for folder, shards in missing.items() if shards}

    def describe(self, missing: Mapping[str, list[int]]) -> str:
        """Return in words which shards are missing; see `missing`."""
        parts = []
        for folder, shards in missing.items():
            first = ", ".join(f"{shard:06d}" for shard in shards[:LISTED_SHARDS])
            more = ", …" if len(shards) > LISTED_SHARDS else ""
            count = len(self.products[folder].fingerprints)
            parts.append(f"{folder} lacks {len(shards)} of {count} shards ({first}{more})")
        return "; ".join(parts)


def write_expected(
    cache: Path, expected: ExpectedCache, arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write, or replace, `plan.safetensors`; a file with the same content is left alone.

    `arrays` are stage 1's own; `read_expected` returns them as they are.
    """
    text = json.dumps(plain(expected), ensure_ascii=False)
    data = safetensors.numpy.save(dict(arrays), metadata={"plan": text})
    path = cache / PLAN
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with atomic_file(path, len(data)) as file:
        file.write(data)


def read_expected(cache: Path) -> tuple[ExpectedCache, dict[str, NDArray[Any]]]:
    """Return what `write_expected` wrote.

    Raises:
        ShardError: the file is missing, damaged, or of another format version.
    """
    path = cache / PLAN
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("plan", "")
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ShardError(f"{cache}: no {PLAN}, so nothing was begun here") from None
    except (OSError, SafetensorError) as error:
        raise ShardError(f"{path}: damaged ({error}); run precompute again") from error
    return decode(text.encode(), ExpectedCache, path, "run precompute again"), arrays
