"""Stage 1 from front to back: plan, text pass, latent pass, manifest."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Mapping

import click
import torch

from common.atomic_files import require_space
from common.device import keep_freed_memory
from common.interruption import InterruptedRun, between_shards
from common.provenance import write_run
from precompute.config import PrecomputeConfig
from precompute.dry_run import dry_run
from precompute.encoding.image_pass import latent_pass
from precompute.encoding.pipeline import EncoderClock
from precompute.encoding.text_pass import text_pass
from precompute.planning.existing_layout import layout_arrays
from precompute.planning.job import Job, prepare
from precompute.planning.plan import abandoned_files
from shards.format import manifest, seal, sidecar
from shards.format.expected_cache import ExpectedCache, write_expected
from shards.format.manifest import Manifest
from shards.format.writer import write_sidecar


def precompute(config: PrecomputeConfig) -> None:
    """Bring the cache at `config.cache` to what the settings ask for.

    Raises:
        ConfigError: see `prepare`.
        ShardError: too many bad rows; finished shards are kept.
        OSError: the cache cannot be written, or there is no room for it; likewise.
    """
    job = prepare(config)
    keep_freed_memory(job.device)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if config.dry_run:
        dry_run(job)
        return
    cache = config.cache
    todo = {folder: job.todo(product) for folder, product in job.products().items()}
    before = seal.previous_manifest(cache)
    say_what_is_to_do(job, todo)
    _count_bad_rows_of_kept_shards(job)
    missing = sum(
        product.shard_bytes(product.shard(shard))
        for folder, product in job.products().items()
        for shard in todo[folder]
    )
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, missing)
    plan = job.sealing_plan()
    write_expected(cache, plan, layout_arrays({"text": job.text, "latents": job.latents}))
    if before is not None and _changes_what_is_listed(job, before, todo):
        # What it says is about to be untrue. What it says of other controls is needed at the end.
        with contextlib.suppress(FileNotFoundError):  # another worker was first
            (cache / manifest.MANIFEST).rename(cache / manifest.PREVIOUS)
    busy = EncoderClock(job.device)
    try:
        with between_shards() as check:
            validation_embeds = text_pass(job, check, busy)
            _free_memory()
            latent_pass(job, validation_embeds, check, busy)
            _free_memory()
    except InterruptedRun as signal:
        job.say(f"{cache}: {signal}, ended between shards; the same command goes on from here")
        raise SystemExit(signal.exit_code) from None
    if busy.seconds:
        share = busy.seconds / (time.perf_counter() - busy.began)
        job.say(f"  encoders computed {share:.0%} of the time")
    _renew_captions(job)
    _finish(job, plan, before)


def _finish(job: Job, plan: ExpectedCache, before: Manifest | None) -> None:
    """Seal the cache, if this worker finds every shard there."""
    cache = job.config.cache
    missing = plan.missing(cache)
    if missing:
        click.echo(
            f"{cache}: part {job.part} is done; {plan.describe(missing)}. "
            "Whichever part is last completes the cache; where the parts lie on several disks, "
            "copy them into one folder and run python -m shards seal."
        )
        return
    was_complete = (cache / manifest.MANIFEST).is_file()
    for product in job.products().values():
        for path in product.surplus():
            path.unlink(missing_ok=True)
    for path in abandoned_files(cache):
        path.unlink(missing_ok=True)
    now = seal.seal(cache, plan)
    if was_complete and now == before:
        job.say(f"{cache}: already complete, nothing to do")
        return
    fingerprints = {folder: product.fingerprint for folder, product in now.products()}
    write_run(cache, "precompute", job.config, fingerprints=fingerprints)
    _report(job, now, before)


def say_what_is_to_do(job: Job, todo: Mapping[str, list[int]]) -> None:
    """Say in a line a product what is kept, what is made and why."""
    for folder, product in job.products().items():
        mine = [shard for shard in range(product.num_shards) if job.part.has(shard)]
        kept = len(mine) - len(todo[folder])
        why = f" ({job.reasons[folder]})" if todo[folder] and job.reasons.get(folder) else ""
        part = "" if job.part.count == 1 else f" of part {job.part}"
        job.say(
            f"  {folder}: {product.num_records} records in {product.num_shards} shards{part}, "
            f"{kept} kept, {len(todo[folder])} to make{why}"
        )


def _count_bad_rows_of_kept_shards(job: Job) -> None:
    for product in (job.latents, job.conditioning):
        for card in job.found[product.folder]:
            job.bad.add(card.skipped if card else [])


def _renew_captions(job: Job) -> None:
    """Have this part's kept latent shards point at the prompts that caption them now.

    Their tars stay as they are.
    """
    for shard in job.outdated_captions():
        card = sidecar.load(job.latents.folder, shard)
        if card is not None:
            plan = job.latents.shard(shard)
            captions = job.captions(plan)
            prompts = [captions[key] for key in card.keys]
            new = dataclasses.replace(card, prompts=prompts, captions=plan.captions)
            write_sidecar(job.latents.folder, new)


def _changes_what_is_listed(job: Job, before: Manifest, todo: Mapping[str, list[int]]) -> bool:
    """Tell whether the work ahead touches a product that the present manifest vouches for."""
    if not (job.config.cache / manifest.MANIFEST).is_file():
        return False
    listed = dict(before.products())
    return bool(job.outdated_captions()) or any(
        folder in listed and (todo[folder] or listed[folder].num_shards != product.num_shards)
        for folder, product in job.products().items()
    )


def _report(job: Job, now: Manifest, before: Manifest | None) -> None:
    for other in before.conditioning if before else ():
        lost = before and before.validation[other].num_records
        if other not in now.conditioning:
            click.echo(f"conditioning {other!r} was made for other latents: make it again")
        elif lost and not now.validation[other].num_records:
            click.echo(f"validation pairs of {other!r} had other text encoders: make them again")
    if job.bad.reasons:
        click.echo(f"{len(job.bad.reasons)} rows were left out:\n{job.bad.table()}")
    size = sum(product.num_bytes for _, product in now.products())
    per_prompt = now.latents.num_records / max(now.text.num_records - 1, 1)
    held = sum(now.latents.shard_records[shard] for shard in now.held_out)
    held_out = f" ({held} held out of training)" if held else ""
    click.echo(
        f"{job.config.cache}: complete, {now.latents.num_records} images{held_out}, "
        f"{now.text.num_records} prompts ({per_prompt:.1f} images each), {size / 1e6:.1f} MB"
    )


def _free_memory() -> None:
    """Give the finished pass's memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
