"""What stands in a cache already: where each item is, so that it may stay there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ShardError
from precompute.planning.layout import EMPTY, Layout
from precompute.planning.plan import ProductPlan
from shards.format import seal, sidecar
from shards.format.expected_cache import read_expected
from shards.format.json_files import digest
from shards.format.keys import slot_of


def layout_arrays(products: Mapping[str, ProductPlan]) -> dict[str, NDArray[Any]]:
    """Return layouts as a cache's plan keeps them; see `layouts_before`."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, product in products.items():
        arrays[f"{name}.ids"] = product.layout.ids
        arrays[f"{name}.starts"] = product.layout.starts
        arrays[f"{name}.buckets"] = product.layout.buckets
    return arrays


def why_made(cache: Path, products: Mapping[str, ProductPlan]) -> dict[str, str]:
    """Return for each product, by folder, why shards of it may have to be made; or nothing.

    Args:
        cache: its folder.
        products: as they are planned now.
    """
    try:
        before, arrays = read_expected(cache)
    except ShardError:
        return {}
    reasons = {}
    for folder, product in products.items():
        planned = before.products.get(folder)
        if planned is None:
            continue
        changed = _changes(planned.identity, product.identity)
        if changed:
            reasons[folder] = "; ".join(changed)
        elif f"{folder}.ids" in arrays:
            there = arrays[f"{folder}.ids"]
            new = int((~np.isin(product.ids, there)).sum())
            gone = int((~np.isin(there[there != 0], product.ids)).sum())
            counts = {"new or changed": new, "gone": gone}
            reasons[folder] = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return reasons


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> list[str]:
    """Return what differs between two identities, in words."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += _changes(was, now, f"{name} ")
        elif all(isinstance(one, str) and len(one) == 32 for one in (was, now)):
            found.append(f"another {within}{name}")  # digests mean nothing to people
        else:
            found.append(f"{within}{name} was {was}, is {now}")
    return found


def layouts_before(cache: Path, identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Layout]:
    """Return the layout of each product that a cache has, as its plan says or its shards.

    It is empty where all records would be other ones, since the product's identity has changed.

    Args:
        cache: its folder.
        identities: of the products, by name.
    """
    try:
        plan, arrays = read_expected(cache)
    except ShardError:
        return {name: _from_sidecars(cache, name, identities[name]) for name in identities}
    found = {}
    for name, identity in identities.items():
        planned = plan.products.get(name)
        same = planned is not None and planned.identity == identity
        found[name] = (
            Layout(*(arrays[f"{name}.{part}"] for part in ("ids", "starts", "buckets")))
            if same
            else EMPTY
        )
    return found


def _from_sidecars(cache: Path, name: str, identity: Mapping[str, Any]) -> Layout:
    """Return the layout that the sidecars tell of; a cache that was copied may lack its plan.

    The slots behind a shard's last record are forgotten: they are not needed.
    """
    before = seal.previous_manifest(cache)
    if before is None:
        return EMPTY
    product = dict(before.products())[name]
    ids: list[int] = []
    starts = [0]
    for shard in range(product.num_shards):
        try:
            card = sidecar.load(cache / name, shard)
        except ShardError:
            return EMPTY
        if card is None or card.identity != digest(identity):
            return EMPTY
        slots = [0] * (max((slot_of(key)[1] for key in card.keys), default=-1) + 1)
        for key in card.keys:
            slots[slot_of(key)[1]] = int(key.rpartition("-")[2], 16)
        ids += slots
        starts.append(len(ids))
    buckets = np.array(product.shard_buckets or [0] * product.num_shards, np.int64)
    if name == "latents":
        buckets[before.held_out] += len(before.buckets)
    return Layout(np.array(ids, np.uint64), np.array(starts, np.int64), buckets)
