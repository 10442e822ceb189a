"""Sealing: from finished shards to a complete cache.

`plan.safetensors` says what a cache is to hold once it is complete. Whoever finds every shard there
as planned writes the manifest: a worker of stage 1, or `python -m shards seal` where the parts of a
cache were made on machines without a common disk and copied together.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from common.atomic_files import atomic_file
from common.errors import ShardError
from shards.format import manifest, sidecar
from shards.format.json_files import FORMAT_VERSION, Count, decode
from shards.format.manifest import LatentSpec, Manifest, TextSpec, captions_digest, product_of
from shards.format.sidecar import Sidecar

PLAN = "plan.safetensors"
LISTED_SHARDS = 8


@dataclass(frozen=True)
class PlannedProduct:
    """What a product's shards must be; the lists have one entry a shard.

    Attributes:
        identity: what a record's bytes depend on besides its content; plain JSON values.
        fingerprints: that the sidecars must have.
        captions: likewise; empty for other products than latents.
        shard_buckets: see `Product`.
    """

    identity: dict[str, Any]
    fingerprints: list[str]
    captions: list[str]
    shard_buckets: list[Count]

    def finished(self, folder: Path, shard: int) -> sidecar.Summary | None:
        """Return what a shard's sidecar says in short if the shard is there as planned."""
        found = sidecar.summary(folder, shard)
        if found is None or found.fingerprint != self.fingerprints[shard]:
            return None
        return found if not self.captions or found.captions == self.captions[shard] else None

    def missing(self, folder: Path) -> list[int]:
        """Return the shards that are not there as planned."""
        numbers = range(len(self.fingerprints))
        return [shard for shard in numbers if self.finished(folder, shard) is None]


@dataclass(frozen=True)
class Plan:
    """What a cache is to hold.

    Attributes:
        products: by folder.
        conditioning_name: the control that was planned; others in the cache stay if they can.
        text_spec: see `Manifest`.
        latent_spec: likewise.
        conditioning_spec: likewise.
        buckets: likewise.
        held_out: likewise.
        made_by: likewise.
    """

    products: dict[str, PlannedProduct]
    conditioning_name: str
    text_spec: TextSpec
    latent_spec: LatentSpec
    conditioning_spec: LatentSpec
    buckets: list[tuple[int, int]]
    held_out: list[Count]
    made_by: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def missing(self, cache: Path) -> dict[str, list[int]]:
        """Return the shards that are not there as planned, by product, of those that lack some."""
        found = {name: one.missing(cache / name) for name, one in self.products.items()}
        return {name: shards for name, shards in found.items() if shards}


def write_plan(cache: Path, plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write, or replace, a cache's plan; one that says the same stays as it is.

    Args:
        cache: its folder.
        plan: what it is to hold.
        arrays: what stage 1 wants to find again.
    """
    text = json.dumps(dataclasses.asdict(plan), ensure_ascii=False)
    data = safetensors.numpy.save(dict(arrays), metadata={"plan": text})
    path = cache / PLAN
    with contextlib.suppress(OSError):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with atomic_file(path, len(data)) as file:
        file.write(data)


def read_plan(cache: Path) -> tuple[Plan, dict[str, NDArray[Any]]]:
    """Return what `write_plan` wrote.

    Raises:
        ShardError: there is no plan, or it is damaged or of another format version.
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
    return decode(text.encode(), Plan, path, "run precompute again"), arrays


def previous_manifest(cache: Path) -> Manifest | None:
    """Return the manifest of a cache as it was last complete, if it ever was."""
    for name in (manifest.MANIFEST, manifest.PREVIOUS):
        if (cache / name).is_file():
            with contextlib.suppress(ShardError):
                return manifest.load(cache, name)
    return None


def seal(cache: Path, plan: Plan) -> Manifest:
    """Write the manifest of a cache whose shards are all there; return it.

    Other controls stay in it if they were made for these latents, and their validation pairs if
    they were encoded as the prompts now are; else they must be made again.

    Raises:
        ShardError: shards are missing or are not the planned ones; naming them.
    """
    missing = plan.missing(cache)
    if missing:
        raise ShardError(f"{cache}: not complete; {what_is_missing(plan, missing)}")
    before = previous_manifest(cache)
    now = _manifest(cache, plan, before)
    if now != before or not (cache / manifest.MANIFEST).is_file():
        manifest.write(cache, now)
    (cache / manifest.PREVIOUS).unlink(missing_ok=True)
    return now


def what_is_missing(plan: Plan, missing: Mapping[str, list[int]]) -> str:
    """Say which shards of a plan are not there."""
    parts = []
    for name, shards in missing.items():
        first = ", ".join(f"{shard:06d}" for shard in shards[:LISTED_SHARDS])
        more = ", …" if len(shards) > LISTED_SHARDS else ""
        count = len(plan.products[name].fingerprints)
        parts.append(f"{name} lacks {len(shards)} of {count} shards ({first}{more})")
    return "; ".join(parts)


def _sidecars(folder: Path, planned: PlannedProduct) -> Iterator[Sidecar]:
    """Yield a product's sidecars, one at a time, since together they may fill the memory."""
    for shard in range(len(planned.fingerprints)):
        card = sidecar.load(folder, shard)
        if card is None:
            raise ShardError(f"{folder}: shard {shard:06d} vanished while it was counted")
        yield card


def _manifest(cache: Path, plan: Plan, before: Manifest | None) -> Manifest:
    skipped: set[str] = set()

    def seen(cards: Iterator[Sidecar]) -> Iterator[Sidecar]:
        for card in cards:
            skipped.update(one.row for one in card.skipped)
            yield card

    products = {
        folder: product_of(
            cache / folder, seen(_sidecars(cache / folder, planned)), planned.shard_buckets
        )
        for folder, planned in plan.products.items()
    }
    name = plan.conditioning_name
    own, pairs_own = manifest.conditioning_folder(name), manifest.validation_folder(name)
    latents = products["latents"]
    text_identity = manifest.digest(plan.products["text"].identity)
    others = before if before and before.latents.fingerprint == latents.fingerprint else None
    pairs = dict(others.validation) if others else {}
    if others and others.text_identity != text_identity:
        pairs = {other: product_of(Path(), []) for other in pairs}
    return Manifest(
        text=products["text"],
        text_spec=plan.text_spec,
        text_identity=text_identity,
        latents=latents,
        latent_spec=plan.latent_spec,
        conditioning=(others.conditioning if others else {}) | {name: products[own]},
        conditioning_specs=(others.conditioning_specs if others else {})
        | {name: plan.conditioning_spec},
        validation=pairs | {name: products[pairs_own]},
        buckets=plan.buckets,
        held_out=plan.held_out,
        captions=captions_digest(_sidecars(cache / "latents", plan.products["latents"])),
        num_skipped=len(skipped),
        made_by=plan.made_by,
    )
