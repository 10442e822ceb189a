"""The plan: which rows and prompts go into which shard, and which finished shards may stay.

A shard is a pure function of its rows, so the plan decides by fingerprints alone.
"""

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from xxhash import xxh3_64_intdigest

from precompute.fingerprint import hash_bytes
from precompute.sources import Row, Source
from precompute.text import prompt_key
from shards import sidecar
from shards.errors import ShardError
from shards.manifest import digest
from shards.records import TensorSpec, record_bytes, record_key
from shards.sidecar import LARGEST_CAPTIONS, Sidecar

HASHING_THREADS = 8
SHARD_FILE = re.compile(r"(?P<shard>\d{6})\.(tar|json)(?P<temporary>\.tmp-\d+)?")
# A shard is written in minutes, and its file's time moves on all the while.
ABANDONED_AFTER_S = 3600
# Two tar headers, padding, a safetensors header and JSON.
RECORD_OVERHEAD_BYTES = 2560


@dataclass(frozen=True)
class PlannedRow:
    """A row with the digests of what it names.

    Attributes:
        row: as found in the source.
        image_hash: of the image's bytes; empty if there are none.
        conditioning_hash: of the conditioning image's bytes; empty if there are none.
        fault: why the row cannot be used, as far as reading it shows; empty if it can.
        conditioning_fault: why its conditioning image cannot be used, likewise.
    """

    row: Row
    image_hash: str
    conditioning_hash: str
    fault: str
    conditioning_fault: str

    @property
    def first_fault(self) -> str:
        """Why the row cannot be used, for either reason; empty if it can."""
        return self.fault or self.conditioning_fault


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be: its number, its rows or prompts, and the fingerprint it must have."""

    shard: int
    items: Sequence[Any]
    fingerprint: str

    def captions(self, prompts: dict[str, str]) -> dict[str, list[str]]:
        """Return, for a shard of rows, image key -> keys of the prompts that caption it."""
        return {
            image_key(self.shard, index, row): [prompts[one] for one in row.row.prompts]
            for index, row in enumerate(self.items)
            if not row.fault
        }


def chosen(rows: Sequence[Row], limit: int | None, seed: int) -> Sequence[Row]:
    """Return at most `limit` rows, in their order.

    The choice is random and nested: with a higher limit these rows are among those chosen.
    """
    if limit is None or limit >= len(rows):
        return rows
    lots = [(xxh3_64_intdigest(b"%d" % at, seed=seed), at) for at in range(len(rows))]
    return [rows[at] for at in sorted(at for _, at in sorted(lots)[:limit])]


def plan_rows(source: Source, rows: Sequence[Row]) -> list[PlannedRow]:
    """Read and hash all that rows of a source name."""
    with (
        ThreadPoolExecutor(HASHING_THREADS) as pool,
        tqdm(total=len(rows), unit="row", desc="reading", disable=None) as bar,
    ):
        planned = []
        for row in pool.map(lambda row: _plan_row(source, row), rows):
            planned.append(row)
            bar.update()
        return planned


def distinct_prompts(rows: Sequence[PlannedRow]) -> list[str]:
    """Return the empty prompt, then each prompt once, in order of first appearance."""
    found = (prompt for row in rows if not row.fault for prompt in row.row.prompts)
    return list(dict.fromkeys(["", *found]))


def plan_text(prompts: Sequence[str], identity: dict[str, Any], size: int) -> list[ShardPlan]:
    """Return the text shards for prompts, `size` to a shard."""
    return [
        ShardPlan(shard, items, digest([identity, list(items)]))
        for shard, items in _split(prompts, size)
    ]


def plan_latents(
    rows: Sequence[PlannedRow], identity: dict[str, Any], size: int
) -> list[ShardPlan]:
    """Return the latent shards for rows, `size` to a shard."""
    return [
        ShardPlan(shard, items, digest([identity, [[r.image_hash, r.fault] for r in items]]))
        for shard, items in _split(rows, size)
    ]


def plan_conditioning(
    rows: Sequence[PlannedRow], identity: dict[str, Any], pixel_range: str, size: int
) -> list[ShardPlan]:
    """Return the conditioning shards for rows, numbered as the latents are."""
    return [
        ShardPlan(
            shard,
            items,
            digest(
                [
                    identity,
                    pixel_range,
                    [[r.image_hash, r.fault, r.conditioning_hash] for r in items],
                ]
            ),
        )
        for shard, items in _split(rows, size)
    ]


def prompt_keys(plans: Sequence[ShardPlan]) -> dict[str, str]:
    """Return prompt -> key of its text record."""
    return {
        prompt: prompt_key(plan.shard, row, prompt)
        for plan in plans
        for row, prompt in enumerate(plan.items)
    }


def image_key(shard: int, row: int, planned: PlannedRow) -> str:
    """Return the key of an image's latent and conditioning records."""
    return record_key(shard, row, planned.image_hash)


@dataclass(frozen=True)
class ProductPlan:
    """The shards of one product, the folder they go into, and the size of a record's tensors."""

    folder: Path
    shards: list[ShardPlan]
    record_bytes: int

    def num_bytes(self, plan: ShardPlan) -> int:
        """Return about how large a planned shard will be."""
        return len(plan.items) * (self.record_bytes + RECORD_OVERHEAD_BYTES)

    def finished(self, plan: ShardPlan) -> Sidecar | None:
        """Return the sidecar of a planned shard if the shard on disk is the planned one."""
        try:
            found = sidecar.load(self.folder, plan.shard)
        except ShardError:
            return None  # damaged or of an older format: to be made again
        if found is None or found.fingerprint != plan.fingerprint:
            return None
        path = sidecar.tar_path(self.folder, plan.shard)
        return found if path.is_file() and path.stat().st_size == found.tar_bytes else None

    def unfinished(self) -> list[ShardPlan]:
        """Return the planned shards that are not on disk as planned."""
        return [plan for plan in self.shards if self.finished(plan) is None]

    def surplus(self) -> list[Path]:
        """Return shards beyond the plan, and temporary files that nobody writes to any more."""
        found = []
        for path in self.folder.glob("*"):
            name = SHARD_FILE.fullmatch(path.name)
            if name is None:
                continue
            if name["temporary"]:
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    found.append(path)
            elif int(name["shard"]) >= len(self.shards):
                found.append(path)
        return sorted(found)

    def sidecars(self) -> list[Sidecar]:
        """Return the sidecars of all shards.

        Raises:
            ShardError: one is not there as planned.
        """
        found = [(plan, self.finished(plan)) for plan in self.shards]
        missing = [f"{plan.shard:06d}" for plan, one in found if one is None]
        if missing:
            raise ShardError(f"{self.folder}: shards {', '.join(missing)} vanished while working")
        return [one for _, one in found if one is not None]


def records_per_shard(shard_mb: float, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many records fit a shard; at least one."""
    return max(1, int(shard_mb * 1e6 / record_bytes(tensors)))


def _plan_row(source: Source, row: Row) -> PlannedRow:
    image_hash, fault = _hash(source, row.image)
    conditioning_hash, conditioning_fault = _hash(source, row.conditioning_image)
    fault = _prompt_fault(row.prompts) or fault
    return PlannedRow(row, image_hash, conditioning_hash, fault, conditioning_fault)


def _prompt_fault(prompts: list[Any]) -> str:
    """Return why a row's captions cannot be used; empty if they can."""
    if not 1 <= len(prompts) <= LARGEST_CAPTIONS:
        return f"{len(prompts)} captions, 1 to {LARGEST_CAPTIONS} expected"
    for prompt in prompts:
        if not isinstance(prompt, str):
            return f"the prompt is not text but {type(prompt).__name__}"
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            return "the prompt is not valid text: half of a surrogate pair"
    return ""


def _hash(source: Source, name: str) -> tuple[str, str]:
    try:
        return hash_bytes(source.read(name)), ""
    except OSError as error:
        return "", f"{name}: {error.strerror or error}"


def _split(items: Sequence[Any], size: int) -> list[tuple[int, Sequence[Any]]]:
    starts = range(0, len(items), size)
    return [(shard, items[start : start + size]) for shard, start in enumerate(starts)]
