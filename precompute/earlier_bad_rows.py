"""Rows that finished shards lack: counted as bad, or, when asked, tried again."""

import dataclasses
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path

from precompute.planning.bad_rows import items_left_out, named, reasons_before
from precompute.planning.context import Context
from precompute.planning.plan import ProductPlan
from shards.format import sidecar
from shards.format.sidecar import Summary
from shards.format.writer import write_sidecar


def count_earlier_bad_rows(context: Context, finished: Mapping[Path, list[Summary | None]]) -> None:
    """Count the rows that were left out of finished shards, of all workers.

    Args:
        context: of the run.
        finished: summaries of the finished shards, by folder.

    Raises:
        ShardError: too many rows are bad.
    """
    inventory, bad_rows = context.inventory, context.bad_rows
    without_latent = set(inventory.faults)
    for product in (context.products.latents, context.products.conditioning):
        is_latents = product is context.products.latents
        faults = inventory.faults if is_latents else inventory.conditioning_faults
        for shard, summary in enumerate(finished[product.folder]):
            if summary is None or not summary.skipped:
                continue
            rows = list(map(context.row_of, items_left_out(product, shard)))
            if is_latents:
                without_latent.update(rows)
            else:  # those without a latent are listed there
                rows = [row for row in rows if row not in without_latent]
            reasons = reasons_before(rows, faults, summary.skipped)
            bad_rows.add(named(context.source, inventory, reasons))


def retry_bad_rows(context: Context) -> list[tuple[ProductPlan, int]]:
    """Have shards counted as unfinished that lack rows with which nothing is known to be wrong.

    Returns:
        these shards; nothing is written.
    """
    retried = [
        (product, shard)
        for product in (context.products.latents, context.products.conditioning)
        for shard in range(product.num_shards)
        if context.part.has(shard) and _may_be_retried(context, product, shard)
    ]
    for product, shard in retried:
        context.finished[product.folder][shard] = None
    return retried


def judge_as_before(context: Context) -> None:
    """Judge the rows that were left out before, those that are tried again included.

    So a run that would end with too many bad rows, if they are as they were, does not begin.

    Raises:
        ShardError: too many rows are bad.
    """
    bad_rows = copy(context.bad_rows)
    bad_rows.rows = dict(bad_rows.rows)
    count_earlier_bad_rows(dataclasses.replace(context, bad_rows=bad_rows), context.finished_now())


def mark_unfinished(shards: Iterable[tuple[ProductPlan, int]]) -> None:
    """Take the fingerprint from the sidecars of shards that are to be made again.

    So they are unfinished until they are made, whatever happens to this run, and the records that
    they have are kept.
    """
    for product, shard in shards:
        found = sidecar.load(product.folder, shard)
        if found is not None:
            write_sidecar(product.folder, dataclasses.replace(found, fingerprint=""))


def _may_be_retried(context: Context, product: ProductPlan, shard: int) -> bool:
    if product.finished(shard) is None:
        return False
    faults = context.inventory.faults.keys() | context.inventory.unreadable.keys()
    if product is context.products.conditioning:
        faults |= context.inventory.conditioning_faults.keys()
    return any(context.row_of(item) not in faults for item in items_left_out(product, shard))
