"""What has become of the source's rows since the cache was last planned, in words."""

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ShardError
from precompute.planning.context import Context
from precompute.planning.held_out import HELD_OUT
from shards.format import seal, sidecar
from shards.format.expected_cache import read_expected
from shards.format.manifest import data_digest

# Changes that a cache remembers.
MOST_CHANGES = 32


def source_changes(context: Context) -> str:
    """Return e.g. `5 rows more, 3 captions changed`; "" if there are none, or no plan to tell.

    A row whose image changed and a row that took the place of another look the same.
    """
    try:
        planned, arrays = read_expected(context.config.cache)
    except ShardError:
        return ""
    old = arrays.get("latents.ids")
    if old is None or not planned.num_rows:
        return ""
    ids = context.products.latents.ids[context.views.is_first]
    stayed, now, before = _count_common(ids, old), len(ids), planned.num_rows
    changed = min(now, before) - stayed
    counts = [
        (now - before, "row", "more"),
        (before - now, "row", "fewer"),
        (changed, "image", "changed"),
        (_changed_captions(context), "caption", "changed"),
    ]
    return ", ".join(
        f"{count} {thing}{'s' * (count > 1)} {what}" for count, thing, what in counts if count > 0
    )


def changes_to_remember(context: Context, what: str) -> list[dict[str, Any]]:
    """Return the changes of a cache, the present one at the end; a training run that is resumed
    finds there what changed since its checkpoint.

    Each says in words `what` changed, and `since` which data, as `manifest.data_digest`.

    Args:
        context: of the run.
        what: changed now, from `source_changes`.
    """
    cache = context.config.cache
    remembered: list[dict[str, Any]] = []
    with suppress(ShardError):
        remembered = read_expected(cache)[0].made_by.get("changes", [])
    before = seal.previous_manifest(cache)
    if before is not None and what:
        since = data_digest(before.fingerprints(next(iter(before.conditioning))))
        remembered = [*remembered, {"since": since, "what": what}]
    return remembered[-MOST_CHANGES:]


def _count_common(ids: NDArray[np.uint64], old: NDArray[np.uint64]) -> int:
    """Return how many ids are among the old ones, held out or not; of equal ones as many as were
    there.
    """
    (names, now), (old_names, before) = (
        np.unique(np.minimum(some, some ^ HELD_OUT[0]), return_counts=True) for some in (ids, old)
    )
    _, at, at_old = np.intersect1d(names, old_names, assume_unique=True, return_indices=True)
    return int(np.minimum(now[at], before[at_old]).sum())


def _changed_captions(context: Context) -> int:
    """Return how many rows that stay have other captions; each is known by its first view."""
    latents, changed = context.products.latents, 0
    for shard, summary in enumerate(context.finished[latents.folder]):
        if summary is not None and summary.captions == latents.captions[shard]:
            continue  # most shards; whole sidecars are large
        card = None
        with suppress(ShardError, OSError):
            card = sidecar.load(latents.folder, shard)
        if card is None or card.captions == latents.captions[shard]:
            continue
        plan = latents.shard(shard)
        planned = context.caption_keys(plan)
        is_first = context.views.is_first[plan.items]
        firsts = {plan.key(int(at), latents.ids) for at in np.flatnonzero(is_first)}
        for key, prompts in zip(card.keys, card.prompts, strict=False):
            if key in firsts:
                changed += _prompt_ids(prompts) != _prompt_ids(planned[key])
    return changed


def _prompt_ids(keys: list[str]) -> list[str]:
    """Return what names the prompts wherever their records lie."""
    return [key.rpartition("-")[2] for key in keys]
