"""Stage 1 from front to back: plan, text pass, image pass, manifest."""

import dataclasses
import time
from collections.abc import Mapping

import click
import torch

from common.atomic_files import require_space
from common.device import free_memory, keep_freed_memory
from common.errors import RunError
from common.interruption import InterruptedRun, stop_between_shards
from common.memory.exhausted import device_remedies, full_memory_line, is_out_of_memory
from common.provenance import write_run
from precompute.config import PrecomputeConfig
from precompute.discarded import (
    SECONDS_A_RECORD,
    describe_put_out,
    refuse_to_discard,
    seconds_a_record,
)
from precompute.dry_run import dry_run
from precompute.earlier_bad_rows import (
    count_earlier_bad_rows,
    judge_as_before,
    mark_unfinished,
    retry_bad_rows,
)
from precompute.encoding.control_pass import draw_controls
from precompute.encoding.control_values import look_at_controls
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.image_pass import encode_images
from precompute.encoding.text_pass import encode_text
from precompute.leftovers import abandoned_files, surplus_files
from precompute.memory.offload import choose_offload
from precompute.planning.context import Context
from precompute.planning.existing_layout import layout_arrays
from precompute.planning.oddities import describe_oddities
from precompute.planning.prepare import prepare
from precompute.source_changes import changes_to_remember, source_changes
from shards.format import manifest, seal, sidecar
from shards.format.expected_cache import ExpectedCache, write_expected
from shards.format.manifest import Manifest
from shards.format.writer import write_sidecar
from shards.info import num_pairs


def precompute(config: PrecomputeConfig) -> None:
    """Build the missing shards of the cache at `config.cache`, and complete it.

    Raises:
        ConfigError: the settings, the source or the base model cannot be used.
        ShardError: too many rows are bad; finished shards are kept.
        RunError: memory is full; finished shards are kept.
        OSError: the cache cannot be written, or does not fit the disk; finished shards are kept.
    """
    context = choose_offload(prepare(config))
    try:
        _precompute(context)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        # Beside the encoders, which step back, and tell it themselves.
        remedies = ["smaller --text-batch-size, --vae-batch-size and --shard-mb"]
        remedies += device_remedies(context.device)
        raise RunError(full_memory_line("stage 1", error, remedies)) from error


def _precompute(context: Context) -> None:
    config = context.config
    keep_freed_memory(context.device)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    retried = retry_bad_rows(context) if config.retry_bad_rows else []
    if config.dry_run:
        dry_run(context)
        return
    if changes := source_changes(context):
        context.print(f"  the source since the last run: {changes}")
    refuse_to_discard(context)
    previous = seal.previous_manifest(config.cache)
    products = context.products_by_folder()
    todo = {folder: context.shards_to_build(product) for folder, product in products.items()}
    for line in [*describe_oddities(context), *look_at_controls(context)]:
        context.print(f"  {line}")
    _print_todo(context, todo)
    if put_out := describe_put_out(context):
        context.print(f"  {put_out}")
    if retried:
        judge_as_before(context)
    count_earlier_bad_rows(context, context.finished)
    config.cache.mkdir(parents=True, exist_ok=True)
    require_space(config.cache, context.bytes_needed())
    expected = _expected_cache(context, changes)
    write_expected(
        config.cache,
        expected,
        layout_arrays({"text": context.products.text, "latents": context.products.latents}),
    )
    if previous is not None and _changes_listed_shards(context, previous, todo):
        seal.withdraw(config.cache)
    mark_unfinished(retried)
    rates = _encode(context)
    _renew_captions(context)
    _finish(context, expected, previous, rates)


def _expected_cache(context: Context, changes: str) -> ExpectedCache:
    """Return what the cache must hold, with its changes so far."""
    expected = context.expected_cache()
    if remembered := changes_to_remember(context, changes):
        return dataclasses.replace(expected, made_by=expected.made_by | {"changes": remembered})
    return expected


def _print_todo(context: Context, todo: Mapping[str, list[int]]) -> None:
    """Print for each product how many shards are kept, how many are built, and why."""
    for folder, product in context.products_by_folder().items():
        count = sum(context.part.has(shard) for shard in range(product.num_shards))
        kept = count - len(todo[folder])
        reason = context.reasons.get(folder)
        why = f" ({reason})" if todo[folder] and reason else ""
        part = "" if context.part.count == 1 else f" of part {context.part}"
        context.print(
            f"  {folder}: {product.num_records} records in {product.num_shards} shards{part}, "
            f"{kept} kept, {len(todo[folder])} to make{why}"
        )


def _changes_listed_shards(
    context: Context, previous: Manifest, todo: Mapping[str, list[int]]
) -> bool:
    """Tell whether the run changes shards that the present manifest lists."""
    if not (context.config.cache / manifest.MANIFEST).is_file():
        return False
    listed = dict(previous.products())
    return bool(context.outdated_captions()) or any(
        folder in listed and (todo[folder] or listed[folder].num_shards != product.num_shards)
        for folder, product in context.products_by_folder().items()
    )


def _encode(context: Context) -> dict[str, float]:
    """Build the missing shards of all products.

    Returns:
        How many seconds the encoders took for a text and for an image, of what they encoded.

    Raises:
        SystemExit: a signal ended the run between two shards.
    """
    clock = EncoderClock(context.device)
    try:
        with stop_between_shards() as check:
            context = draw_controls(context, check, clock)
            drawing = clock.seconds
            free_memory()
            validation_embeds = encode_text(context, check, clock)
            text = clock.seconds - drawing, clock.num_items
            free_memory()
            encode_images(context, validation_embeds, check, clock)
            free_memory()
    except InterruptedRun as signal:
        context.print(
            f"{context.config.cache}: {signal}, ended between shards; "
            "the same command goes on from here"
        )
        raise SystemExit(signal.exit_code) from None
    if clock.seconds:
        share = clock.seconds / (time.perf_counter() - clock.began)
        context.print(f"  encoders computed {share:.0%} of the time")
    images = clock.seconds - drawing - text[0], clock.num_items - text[1]
    kinds = {"text": text, "images": images}
    return {kind: seconds / count for kind, (seconds, count) in kinds.items() if count}


def _renew_captions(context: Context) -> None:
    """Update the captions in this worker's latent sidecars; the tars stay as they are."""
    latents = context.products.latents
    for shard in context.outdated_captions():
        existing = sidecar.load(latents.folder, shard)
        if existing is not None:
            plan = latents.shard(shard)
            caption_keys = context.caption_keys(plan)
            prompts = [caption_keys[key] for key in existing.keys]
            renewed = dataclasses.replace(existing, prompts=prompts, captions=plan.captions)
            write_sidecar(latents.folder, renewed)


def _finish(
    context: Context,
    expected: ExpectedCache,
    previous: Manifest | None,
    rates: dict[str, float],
) -> None:
    """Seal the cache, if all shards of all workers are there."""
    cache = context.config.cache
    missing = expected.missing(cache)
    if missing:
        click.echo(
            f"{cache}: part {context.part} is done; {expected.describe(missing)}. "
            "Whichever part is last completes the cache; where the parts lie on several disks, "
            "copy them into one folder and run python -m shards seal."
        )
        return
    if context.part.count > 1:
        count_earlier_bad_rows(context, context.finished_now())  # of the other workers, too
    was_complete = (cache / manifest.MANIFEST).is_file()
    for product in context.products_by_folder().values():
        for path in surplus_files(product):
            path.unlink(missing_ok=True)
    for path in abandoned_files(cache):
        path.unlink(missing_ok=True)
    sealed = seal.seal(cache, expected)
    if was_complete and sealed == previous:
        context.print(f"{cache}: already complete{_left_out(sealed)}, nothing to do")
        return
    fingerprints = {folder: product.fingerprint for folder, product in sealed.products()}
    speed = {SECONDS_A_RECORD: seconds_a_record(cache) | rates}
    write_run(cache, "precompute", context.config, fingerprints=fingerprints, **speed)
    _report(context, sealed, previous)


def _report(context: Context, sealed: Manifest, previous: Manifest | None) -> None:
    """Print the controls that were lost, the rows that were left out and the size of the cache."""
    for name in previous.conditioning if previous else ():
        had_pairs = previous and previous.validation[name].num_records
        if name not in sealed.conditioning:
            click.echo(f"conditioning {name!r} was made for other latents: make it again")
        elif had_pairs and not sealed.validation[name].num_records:
            own = name == context.config.conditioning_name
            why = "are gone, since no --validation-prompt is given"
            why = why if own else "had other text encoders: make them again"
            click.echo(f"validation pairs of {name!r} {why}")
    if context.bad_rows:
        count = len(context.bad_rows)
        click.echo(f"{count} rows were left out:\n{context.bad_rows.table()}")
    size = sum(product.num_bytes for _, product in sealed.products())
    pairs = num_pairs(sealed, context.config.conditioning_name)
    click.echo(
        f"{context.config.cache}: complete, {pairs}{_left_out(sealed)}, "
        f"{sealed.text.num_records} prompts, {size / 1e6:.1f} MB"
    )


def _left_out(sealed: Manifest) -> str:
    return f", {sealed.num_skipped} rows left out" if sealed.num_skipped else ""
