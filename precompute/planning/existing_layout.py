"""The layout of an existing cache, whose items keep their slots; and why shards are built again."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ShardError
from precompute.fingerprints.encoder_spec import Identity
from precompute.planning.layout import EMPTY, Layout
from precompute.planning.plan import ProductPlan
from shards.format import seal, sidecar
from shards.format.expected_cache import read_expected
from shards.format.json_files import digest
from shards.format.keys import slot_of


def layout_arrays(products: Mapping[str, ProductPlan]) -> dict[str, NDArray[Any]]:
    """Return the layouts of products as arrays by name; `existing_layouts` reads them again."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, product in products.items():
        arrays[f"{name}.ids"] = product.layout.ids
        arrays[f"{name}.starts"] = product.layout.starts
        arrays[f"{name}.buckets"] = product.layout.buckets
    return arrays


def identities_in_use(
    cache: Path, identities: Mapping[str, tuple[Identity, Identity]]
) -> list[Identity]:
    """Return the identity of each product, in the form that the records in the cache have.

    So a cache that a former version made is not made again because identities are written in
    another form; it keeps the former one until something else changes.

    Args:
        cache: its folder.
        identities: by the product's folder: as it is written now, and by former versions.
    """
    planned: dict[str, str] = {}
    with contextlib.suppress(ShardError):
        products = read_expected(cache)[0].products
        planned = {folder: digest(product.identity) for folder, product in products.items()}
    chosen = []
    for folder, (now, former) in identities.items():
        summary = sidecar.load_summary(cache / folder, 0)
        found = planned.get(folder) or (summary.identity if summary else "")
        chosen.append(former if found == digest(former) else now)
    return chosen


def existing_layouts(cache: Path, identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Layout]:
    """Return the layout of each product in a cache, from its plan or else from its sidecars.

    A layout is empty if the product's identity has changed, since then no record can be kept.

    Args:
        cache: its folder.
        identities: of the products, by name.
    """
    try:
        expected, arrays = read_expected(cache)
    except ShardError:
        return {name: _from_sidecars(cache, name, identities[name]) for name in identities}
    layouts = {}
    for name, identity in identities.items():
        planned = expected.products.get(name)
        if planned is not None and planned.identity == identity:
            parts = (arrays[f"{name}.{part}"] for part in ("ids", "starts", "buckets"))
            layouts[name] = Layout(*parts)
        else:
            layouts[name] = EMPTY
    return layouts


def _from_sidecars(cache: Path, name: str, identity: Mapping[str, Any]) -> Layout:
    """Return the layout that the sidecars show; a cache that was copied may lack its plan.

    The slots behind a shard's last record are lost, which does no harm.
    """
    previous = seal.previous_manifest(cache)
    if previous is None:
        return EMPTY
    product = dict(previous.products())[name]
    ids: list[int] = []
    starts = [0]
    for shard in range(product.num_shards):
        try:
            loaded = sidecar.load(cache / name, shard)
        except ShardError:
            return EMPTY
        if loaded is None or loaded.identity != digest(identity):
            return EMPTY
        slots = [0] * (max((slot_of(key)[1] for key in loaded.keys), default=-1) + 1)
        for key in loaded.keys:
            slots[slot_of(key)[1]] = int(key.rpartition("-")[2], 16)
        ids += slots
        starts.append(len(ids))
    buckets = np.array(product.shard_buckets or [0] * product.num_shards, np.int64)
    if name == "latents":
        buckets[previous.held_out] += len(previous.buckets)
    return Layout(np.array(ids, np.uint64), np.array(starts, np.int64), buckets)


def reasons_to_build(cache: Path, products: Mapping[str, ProductPlan]) -> dict[str, str]:
    """Return for each product, by folder, what has changed since the cache's plan was written.

    Args:
        cache: its folder.
        products: as they are planned now, by folder.
    """
    try:
        expected, arrays = read_expected(cache)
    except ShardError:
        return {}
    reasons = {}
    for folder, product in products.items():
        planned = expected.products.get(folder)
        if planned is None:
            continue
        changes = _changes(planned.identity, product.identity)
        if changes:
            reasons[folder] = "; ".join(changes)
        elif f"{folder}.ids" in arrays:
            old_ids = arrays[f"{folder}.ids"]
            new = int((~np.isin(product.ids, old_ids)).sum())
            gone = int((~np.isin(old_ids[old_ids != 0], product.ids)).sum())
            counts = {"new or changed": new, "gone": gone}
            reasons[folder] = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return reasons


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], within: str = "") -> list[str]:
    """Return the differences between two identities, in words."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            changes += _changes(was, now, f"{name} ")
        elif name == "drawn_by":
            changes.append(_drawn_otherwise(_words(was or []), _words(now or [])))
        elif all(isinstance(value, str) and len(value) == 32 for value in (was, now)):
            changes.append(f"another {within}{name}")  # digests mean nothing to people
        else:
            changes.append(f"{within}{name} was {was}, is {now}")
    return changes


def _words(annotator: Sequence[str]) -> str:
    """Return what an annotator is known by in words, its digests aside."""
    digests = re.compile("[0-9a-f]{32}|[0-9a-f]{64}")
    return " ".join(part for part in annotator if not digests.fullmatch(part) and part != "{}")


def _drawn_otherwise(was: str, now: str) -> str:
    if was == now:
        return f"{now} draws otherwise: other code, files or weights"
    return f"drawn by {now or 'nobody'}, was by {was or 'nobody'}"
