"""Preparing a run: open and check the source and the base model, hash, and plan the shards."""

import os
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageColor

from common.device import pick_device
from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.encoder_spec import (
    EncoderSpecs,
    Identity,
    read_specs,
    text_components,
)
from precompute.planning.bad_rows import BadRows, faulty_rows
from precompute.planning.context import Context, Products
from precompute.planning.existing_layout import existing_layouts
from precompute.planning.held_out import held_out_rows
from precompute.planning.identities import find_identities
from precompute.planning.inventory import Inventory, choose_rows, take_inventory
from precompute.planning.layout import Layout
from precompute.planning.plan import ProductPlan
from precompute.planning.products import (
    Prompts,
    distinct_prompts,
    image_contents,
    in_other_shape,
    in_srgb,
    over_background,
    plan_conditioning,
    plan_latents,
    plan_text,
    with_captions,
)
from precompute.planning.size_limits import refuse_too_large_files
from precompute.planning.validation_pairs import (
    ValidationPair,
    find_pairs,
    pairs_over,
    plan_validation,
)
from precompute.planning.views.listing import Views, list_views
from precompute.planning.workers import find_part
from precompute.sources.caches import HASHES, not_of_a_cache
from precompute.sources.kept_images import KeptImages
from precompute.sources.open_source import open_source
from precompute.sources.source import Kind, Source
from sd3.annotators.annotator import Annotator
from sd3.annotators.registry import find_annotator
from sd3.base.find import find_base
from sd3.base.without_t5 import uses_t5
from sd3.buckets import nearest_buckets
from sd3.value_scale import AS_IS
from shards.format.manifest import conditioning_folder, validation_folder
from shards.format.tensor_spec import record_bytes


def prepare(config: PrecomputeConfig) -> Context:
    """Open and check the source and the base model, hash what they hold, and plan the shards.

    Raises:
        ConfigError: the source or base model cannot be used.
        ShardError: too many of the source's files are missing.
    """
    _refuse_other_files(config.cache)
    part = find_part(config.part, os.environ)
    device = pick_device(config.device or _device_of_this_process())
    annotator = _find_annotator(config)
    source = KeptImages(open_source(config.source_settings()), _uses_of_images(config, annotator))
    if part.leads or config.part is not None:
        _print_source(source)
    with_t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
    base = find_base(
        config.pretrained_model_name_or_path,
        (*text_components(with_t5=with_t5), "vae"),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        single_file_config=config.single_file_config,
    )
    specs = read_specs(base, config)
    pairs = find_pairs(config, specs.latent_settings.shapes, annotator)
    digests = DigestCache(config.cache / HASHES, keep=not config.dry_run)
    # One process of a machine reads the weights; the others wait, and find their digests.
    with digests.hashing_lock():
        identities = find_identities(config, specs, annotator, digests)
        digests.save()
    pairs = pairs_over(pairs, identities[2], config.background)
    inventory = _take_inventory(config, source, identities, digests)
    bad = BadRows(len(inventory), 0.0 if config.strict else config.max_bad_fraction)
    bad.add(faulty_rows(source, inventory))
    held_out = held_out_rows(inventory, config.validation_rows, config.seed)
    prompts = distinct_prompts(inventory)
    views = list_views(held_out, config.views, mirrored=config.random_flip)
    products = _plan_products(config, specs, identities, inventory, held_out, views, prompts, pairs)
    refuse_too_large_files(config, products, inventory, views)
    return Context(
        config=config,
        part=part,
        device=device,
        source=source,
        annotator=annotator,
        digests=digests,
        specs=specs,
        inventory=inventory,
        held_out=held_out,
        views=views,
        bad_rows=bad,
        prompts=prompts,
        pairs=pairs,
        products=products,
    )


def _find_annotator(config: PrecomputeConfig) -> Annotator | None:
    if config.conditioning_from is None:
        return None
    annotator = find_annotator(
        config.conditioning_from, config.conditioning_args, cache_dir=config.cache_dir
    )
    if config.inpainting and annotator.in_batches:
        raise ConfigError(
            f"--conditioning-from {config.conditioning_from}: draws no masks, which "
            "--num-extra-conditioning-channels 1 needs; strokes does."
        )
    return annotator


def _take_inventory(
    config: PrecomputeConfig, source: Source, identities: Sequence[Identity], digests: DigestCache
) -> Inventory:
    """Return the inventory of the rows that the settings choose."""
    rows = choose_rows(len(source), config.max_train_samples, config.seed)
    colour = list(ImageColor.getrgb(config.background))
    inventory = take_inventory(
        source,
        rows,
        digests,
        conditioning=config.conditioning_from is None,
        transparency=any(colour != identity["background"] for identity in identities[1:]),
        floats=config.conditioning_scale != AS_IS,
        any_shape=config.conditioning_fit != "refuse",
        min_image_px=config.min_image_px,
    )
    if not len(inventory):
        raise ConfigError(
            f"--min-image-px {config.min_image_px}: the images of all {len(rows)} rows are "
            "smaller; give less."
        )
    return inventory


def _uses_of_images(config: PrecomputeConfig, annotator: Annotator | None) -> dict[Kind, int]:
    """Return how often an image of each kind is encoded or drawn from."""
    each = config.images_per_row
    again = annotator is not None or config.inpainting
    return {"image": each * (2 if again else 1), "conditioning_image": each}


def _print_source(source: Source) -> None:
    """Print how the data set lies on the disk, and what of it is left out or not read.

    Before it is read: where too many rows are bad, this tells why.
    """
    click.echo(f"layout: {source.layout}")
    for remark in source.remarks:
        click.echo(f"  {remark}")


def _refuse_other_files(cache: Path) -> None:
    """Refuse to write into a folder that holds other files than a cache's."""
    if cache.exists() and not cache.is_dir():
        raise ConfigError(f"--cache {cache}: is a file; give a folder.")
    if cache.is_dir():
        others = not_of_a_cache(path.name for path in cache.iterdir())
        if others:
            raise ConfigError(
                f"--cache {cache}: not a cache, it holds {', '.join(others[:4])}; "
                "give a new or empty folder, or a cache."
            )


def _device_of_this_process() -> str | None:
    """Return the GPU of a process that `accelerate launch` started beside others, or None.

    As accelerate's own choice; a process may see only the GPU that a batch system gave it.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    if not local_rank or not torch.cuda.is_available():
        return None
    return f"cuda:{int(local_rank) % torch.cuda.device_count()}"


def _plan_products(
    config: PrecomputeConfig,
    specs: EncoderSpecs,
    identities: Sequence[Identity],
    inventory: Inventory,
    held_out: NDArray[np.bool_],
    views: Views,
    prompts: Prompts,
    pairs: list[ValidationPair],
) -> Products:
    """Return the plans of all products; the identities are text's, latents' and conditioning's."""
    cache, name = config.cache, config.conditioning_name
    text_id, latent_id, control_id = identities
    existing = existing_layouts(cache, {"text": text_id, "latents": latent_id})
    text = plan_text(
        cache / "text",
        prompts,
        text_id,
        specs.text.tensor_specs(),
        config.shard_mb,
        existing["text"],
    )
    latents = with_captions(
        _plan_latents(config, specs, latent_id, inventory, held_out, views, existing["latents"]),
        views,
        inventory,
        prompts,
        text,
    )
    conditionings = over_background(
        in_other_shape(inventory.conditionings, inventory.other_shape, config.conditioning_fit),
        inventory.transparent[:, 1],
        control_id,
        config.background,
    )
    conditioning = plan_conditioning(
        cache / conditioning_folder(name),
        latents,
        conditionings[views.rows],
        control_id,
        [specs.conditioning.tensor_specs("conditioning_latent", grid) for grid in specs.grids],
    )
    validation = plan_validation(
        cache / validation_folder(name),
        pairs,
        {"text": text_id, "conditioning": control_id},
        _pair_bytes(specs),
    )
    return Products(text, latents, conditioning, validation)


def _plan_latents(
    config: PrecomputeConfig,
    specs: EncoderSpecs,
    identity: Identity,
    inventory: Inventory,
    held_out: NDArray[np.bool_],
    views: Views,
    existing: Layout,
) -> ProductPlan:
    images = over_background(
        in_srgb(inventory.images, inventory.has_profile),
        inventory.transparent[:, 0],
        identity,
        config.background,
    )
    return plan_latents(
        config.cache / "latents",
        image_contents(images, held_out, views, config.random_crops),
        nearest_buckets(inventory.sizes, specs.latent_settings.shapes)[views.rows],
        held_out[views.rows],
        identity,
        [specs.latents.tensor_specs("latent", grid) for grid in specs.grids],
        config.shard_mb,
        existing,
    )


def _pair_bytes(specs: EncoderSpecs) -> list[int]:
    """Return the size of a validation record's tensors, by bucket."""
    return [
        record_bytes(specs.text.tensor_specs())
        + record_bytes(specs.conditioning.tensor_specs("conditioning_latent", grid))
        + (3 + specs.conditioning.extra_channels) * width * height
        for grid, (width, height) in zip(specs.grids, specs.latent_settings.shapes, strict=True)
    ]
