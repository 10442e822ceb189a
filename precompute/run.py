"""Stage 1 from front to back: plan, text pass, latent pass, manifest."""

import dataclasses
import gc
from pathlib import Path

import click
import torch

from precompute.config import PrecomputeConfig
from precompute.job import Job, prepare
from precompute.passes import latent_pass, text_pass
from shards import manifest
from shards.errors import ShardError
from shards.manifest import Manifest, digest, product_of
from shards.provenance import versions, write_run
from shards.writer import write_sidecar


def precompute(config: PrecomputeConfig) -> None:
    """Bring the cache at `config.output_dir` to what the settings ask for.

    Raises:
        ConfigError: see `prepare`.
        ShardError: too many bad rows; finished shards are kept.
        OSError: the cache cannot be written; likewise.
    """
    cache = config.output_dir
    click.echo(f"precompute: reading {config.source}")
    job = prepare(config)
    products = job.products()
    todo = {folder: product.unfinished() for folder, product in products.items()}
    before = _present_manifest(cache)
    for folder, product in products.items():
        records = sum(len(shard.items) for shard in product.shards)
        kept = len(product.shards) - len(todo[folder])
        click.echo(
            f"  {folder}: {records} records in {len(product.shards)} shards, "
            f"{kept} kept, {len(todo[folder])} to make"
        )
    _count_bad_rows_of_kept_shards(job)

    cache.mkdir(parents=True, exist_ok=True)
    if before is not None and _changes_listed_shards(job, before):
        (cache / manifest.MANIFEST).unlink()
    validation_embeds = text_pass(job)
    _free_memory()
    latent_pass(job, validation_embeds)
    _free_memory()
    _refresh_captions(job)
    for product in products.values():
        for path in product.surplus():
            path.unlink()
    now = _new_manifest(job, before)
    if now == before:
        click.echo(f"{cache}: already complete, nothing to do")
        return
    fingerprints = {folder: product.fingerprint for folder, product in now.products()}
    write_run(cache, "precompute", config, fingerprints=fingerprints)
    manifest.write(cache, now)
    _report(job, now)


def _count_bad_rows_of_kept_shards(job: Job) -> None:
    for product in (job.latents, job.conditioning):
        for shard in product.shards:
            card = product.finished(shard)
            job.bad.add(card.skipped if card else [])


def _refresh_captions(job: Job) -> None:
    """Point kept latent shards at the prompts' present places; the tars stay untouched."""
    for shard in job.latents.shards:
        card = job.latents.finished(shard)
        if card is None:
            continue
        captions = shard.captions(job.prompts)
        prompts = [captions[key] for key in card.keys]
        if prompts != card.prompts:
            write_sidecar(job.latents.folder, dataclasses.replace(card, prompts=prompts))


def _present_manifest(cache: Path) -> Manifest | None:
    try:
        return manifest.load(cache)
    except ShardError:
        return None


def _changes_listed_shards(job: Job, before: Manifest) -> bool:
    """Tell whether the work ahead touches a product that the present manifest vouches for."""
    listed = dict(before.products())
    return before.captions != _captions(job) or any(
        folder in listed
        and (product.unfinished() or listed[folder].num_shards != len(product.shards))
        for folder, product in job.products().items()
    )


def _captions(job: Job) -> str:
    return digest([shard.captions(job.prompts) for shard in job.latents.shards])


def _new_manifest(job: Job, before: Manifest | None) -> Manifest:
    """Return the manifest of the finished cache; other controls stay if they fit the latents."""
    products = {folder: product_of(one.sidecars()) for folder, one in job.products().items()}
    text, latents, conditioning, validation = products.values()
    name = job.config.conditioning_name
    fits = before is not None and before.latents.fingerprint == latents.fingerprint
    others = before if fits else None
    return Manifest(
        text=text,
        text_spec=job.text_spec,
        latents=latents,
        latent_spec=job.latent_spec,
        conditioning=(others.conditioning if others else {}) | {name: conditioning},
        conditioning_specs=(others.conditioning_specs if others else {})
        | {name: job.conditioning_spec},
        validation=(others.validation if others else {}) | {name: validation},
        captions=_captions(job),
        num_skipped=len(job.bad.reasons),
        made_by={
            "base": job.config.pretrained_model_name_or_path,
            "revision": job.config.revision,
            "versions": versions(),
        },
    )


def _report(job: Job, now: Manifest) -> None:
    if job.bad.reasons:
        click.echo(f"{len(job.bad.reasons)} rows were left out:\n{job.bad.table()}")
    size = sum(product.num_bytes for _, product in now.products())
    per_prompt = now.latents.num_records / max(now.text.num_records - 1, 1)
    click.echo(
        f"{job.config.output_dir}: complete, {now.latents.num_records} images, "
        f"{now.text.num_records} prompts ({per_prompt:.1f} images each), {size / 1e6:.1f} MB"
    )


def _free_memory() -> None:
    """Give the finished pass's memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
