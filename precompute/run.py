"""Stage 1 from front to back: plan, text pass, latent pass, manifest."""

import contextlib
import dataclasses
import gc
from pathlib import Path

import click
import torch

from precompute.config import PrecomputeConfig
from precompute.interruption import InterruptedRun, between_shards
from precompute.job import Job, prepare
from precompute.passes import latent_pass, text_pass
from precompute.plan import ShardPlan
from shards import manifest
from shards.device import keep_freed_memory
from shards.errors import ShardError
from shards.manifest import Manifest, product_of
from shards.provenance import versions, write_run
from shards.sidecar import Sidecar
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
    keep_freed_memory(job.device)
    products = job.products()
    todo = {folder: product.unfinished() for folder, product in products.items()}
    before = _manifest_before(cache)
    for folder, product in products.items():
        records = sum(len(shard.items) for shard in product.shards)
        kept = len(product.shards) - len(todo[folder])
        click.echo(
            f"  {folder}: {records} records in {len(product.shards)} shards, "
            f"{kept} kept, {len(todo[folder])} to make"
        )
    _count_bad_rows_of_kept_shards(job)

    cache.mkdir(parents=True, exist_ok=True)
    if before is not None and _changes_what_is_listed(job, before, todo):
        # What it says is about to be untrue. What it says of other controls is needed at the end.
        (cache / manifest.MANIFEST).rename(cache / manifest.PREVIOUS)
    try:
        with between_shards() as check:
            validation_embeds = text_pass(job, check)
            _free_memory()
            latent_pass(job, validation_embeds, check)
            _free_memory()
    except InterruptedRun as signal:
        click.echo(f"{cache}: {signal}, ended between shards; the same command goes on from here")
        raise SystemExit(signal.exit_code) from None
    for card, prompts in _outdated_captions(job):
        write_sidecar(job.latents.folder, dataclasses.replace(card, prompts=prompts))
    for product in products.values():
        for path in product.surplus():
            path.unlink()
    now = _new_manifest(job, before)
    if now == before and (cache / manifest.MANIFEST).is_file():
        click.echo(f"{cache}: already complete, nothing to do")
    else:
        fingerprints = {folder: product.fingerprint for folder, product in now.products()}
        write_run(cache, "precompute", config, fingerprints=fingerprints)
        manifest.write(cache, now)
        (cache / manifest.PREVIOUS).unlink(missing_ok=True)
        _report(job, now, before)


def _count_bad_rows_of_kept_shards(job: Job) -> None:
    for product in (job.latents, job.conditioning):
        for shard in product.shards:
            card = product.finished(shard)
            job.bad.add(card.skipped if card else [])


def _outdated_captions(job: Job) -> list[tuple[Sidecar, list[list[str]]]]:
    """Return kept latent shards that point at other prompts than they should, and at which.

    Their tars stay as they are.
    """
    outdated = []
    for shard in job.latents.shards:
        card = job.latents.finished(shard)
        if card is not None:
            captions = shard.captions(job.prompts)
            prompts = [captions[key] for key in card.keys]
            if prompts != card.prompts:
                outdated.append((card, prompts))
    return outdated


def _manifest_before(cache: Path) -> Manifest | None:
    """Return the manifest of the cache as it was last complete, if it ever was."""
    for name in (manifest.MANIFEST, manifest.PREVIOUS):
        if (cache / name).is_file():
            with contextlib.suppress(ShardError):
                return manifest.load(cache, name)
    return None


def _changes_what_is_listed(job: Job, before: Manifest, todo: dict[str, list[ShardPlan]]) -> bool:
    """Tell whether the work ahead touches a product that the present manifest vouches for."""
    if not (job.config.output_dir / manifest.MANIFEST).is_file():
        return False
    listed = dict(before.products())
    return bool(_outdated_captions(job)) or any(
        folder in listed and (todo[folder] or listed[folder].num_shards != len(product.shards))
        for folder, product in job.products().items()
    )


def _new_manifest(job: Job, before: Manifest | None) -> Manifest:
    """Return the manifest of the finished cache.

    Other controls stay in it if they were made for these latents, and their validation pairs if
    they were encoded as the prompts now are; else they must be made again.
    """
    side = job.config.resolution // job.latent_spec.vae_scale_factor
    text = product_of(job.text.folder, job.text.sidecars())
    latents, conditioning, validation = (
        product_of(one.folder, one.sidecars(), [0] * len(one.shards))
        for one in (job.latents, job.conditioning, job.validation)
    )
    name = job.config.conditioning_name
    others = before if before and before.latents.fingerprint == latents.fingerprint else None
    pairs = dict(others.validation) if others else {}
    if others and others.text_identity != job.text_identity:
        pairs = {other: product_of(Path(), []) for other in pairs}
    return Manifest(
        text=text,
        text_spec=job.text_spec,
        text_identity=job.text_identity,
        buckets=[(side, side)],
        latents=latents,
        latent_spec=job.latent_spec,
        conditioning=(others.conditioning if others else {}) | {name: conditioning},
        conditioning_specs=(others.conditioning_specs if others else {})
        | {name: job.conditioning_spec},
        validation=pairs | {name: validation},
        captions=manifest.captions_digest(job.latents.sidecars()),
        num_skipped=len(job.bad.reasons),
        made_by={
            "base": job.config.pretrained_model_name_or_path,
            "revision": job.config.revision,
            "versions": versions(),
        },
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
    click.echo(
        f"{job.config.output_dir}: complete, {now.latents.num_records} images, "
        f"{now.text.num_records} prompts ({per_prompt:.1f} images each), {size / 1e6:.1f} MB"
    )


def _free_memory() -> None:
    """Give the finished pass's memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
