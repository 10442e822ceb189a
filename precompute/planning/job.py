"""A precompute job: everything that is known and checked before the first byte is written."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from common.device import pick_device
from common.errors import ConfigError, ShardError
from common.provenance import RUN, versions
from precompute.config import PrecomputeConfig
from precompute.planning import plan
from precompute.planning.bad_rows import BadRows, bad_rows
from precompute.planning.digest_cache import DigestCache
from precompute.planning.encoder_spec import (
    COMPONENTS,
    LatentSettings,
    TextSettings,
    latent_identity,
    latent_spec,
    text_identity,
    text_spec,
)
from precompute.planning.existing_layout import layouts_before, why_made
from precompute.planning.held_out import held_out_rows
from precompute.planning.inventory import (
    Inventory,
    chosen,
    digest_hex,
    prompt_digest,
    take_inventory,
)
from precompute.planning.plan import ProductPlan, Prompts, ShardPlan
from precompute.planning.validation_pairs import ValidationPair, find_pairs, plan_validation
from precompute.planning.workers import Part, find_part
from precompute.sources.annotators import Annotator, find_annotator
from precompute.sources.opening import open_source
from precompute.sources.source import Kind, Source, printable
from sd3.buckets import bucket_shapes, nearest_buckets
from sd3.pretrained import find_base
from shards.format import manifest
from shards.format.expected_cache import PLAN, ExpectedCache, ExpectedProduct
from shards.format.manifest import conditioning_folder, validation_folder
from shards.format.sidecar import Summary
from shards.format.specs import LatentSpec, TextSpec
from shards.format.tensor_spec import record_bytes

HASHES = "hashes.npy"


@dataclass(frozen=True)
class Job:
    """What is to be made, from what, with what; and which part of it here."""

    config: PrecomputeConfig
    part: Part
    source: Source
    remembered: DigestCache
    base: Path
    device: torch.device
    bad: BadRows
    annotator: Annotator | None
    text_settings: TextSettings
    latent_settings: LatentSettings
    text_spec: TextSpec
    latent_spec: LatentSpec
    conditioning_spec: LatentSpec
    inventory: Inventory
    held_out: NDArray[np.bool_]
    prompts: Prompts
    text_addresses: Any
    pairs: list[ValidationPair]
    text: ProductPlan
    latents: ProductPlan
    conditioning: ProductPlan
    validation: ProductPlan

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why shards have to be made, by folder."""
        return why_made(self.config.cache, self.products())

    def products(self) -> dict[str, ProductPlan]:
        """Return the product plans by folder name, in the order they are made."""
        return {
            "text": self.text,
            "latents": self.latents,
            conditioning_folder(self.config.conditioning_name): self.conditioning,
            validation_folder(self.config.conditioning_name): self.validation,
        }

    @cached_property
    def found(self) -> dict[Path, list[Summary | None]]:
        """What was on disk as planned when this was first asked for, by product's folder."""
        return {
            product.folder: [product.finished(shard) for shard in range(product.num_shards)]
            for product in self.products().values()
        }

    def todo(self, product: ProductPlan) -> list[int]:
        """Return the shards of this part that were not on disk as planned."""
        shards = enumerate(self.found[product.folder])
        return [shard for shard, card in shards if card is None and self.part.has(shard)]

    def outdated_captions(self) -> list[int]:
        """Return kept latent shards of this part that point at other prompts than they should."""
        shards = zip(self.found[self.latents.folder], self.latents.captions, strict=True)
        return [
            shard
            for shard, (card, captions) in enumerate(shards)
            if card is not None and card.captions != captions and self.part.has(shard)
        ]

    @property
    def quiet(self) -> bool | None:
        """Whether this worker leaves talking to another; None lets tqdm see for itself."""
        return None if self.part.leads or self.config.part is not None else True

    def say(self, text: str) -> None:
        """Print a line, once for all workers of a launch."""
        if not self.quiet:
            click.echo(text)

    @property
    def copies(self) -> int:
        """How many images each row gives: 2 with its mirror."""
        return 2 if self.config.random_flip else 1

    def row_of(self, item: int) -> int:
        """Return the row of the inventory that an image is of."""
        return item // self.copies

    def is_mirrored(self, item: int) -> bool:
        """Tell whether an image is the mirror of its row's."""
        return item % self.copies == 1

    def row_name(self, item: int) -> str:
        """Return what an image's row is called in reports."""
        (row,) = self.source.rows([int(self.inventory.rows[self.row_of(item)])])
        return row.name

    def file_name(self, row: int, kind: Kind) -> str:
        """Return what a row's image, or conditioning image, is called."""
        (found,) = self.source.rows([int(self.inventory.rows[row])])
        name = found.image if kind == "image" else found.conditioning_image
        return printable(name) or f"{found.where}, {kind}"

    def prompt(self, item: int) -> str:
        """Return a prompt of the text product.

        Raises:
            ShardError: the source has another there than when the run was planned.
        """
        caption = int(self.prompts.first[item]) - 1
        if caption < 0:
            return ""
        row = int(np.searchsorted(self.inventory.caption_ends, caption, side="right")) - 1
        (found,) = self.source.rows([int(self.inventory.rows[row])])
        prompts = found.prompts
        number = caption - int(self.inventory.caption_ends[row])
        prompt = prompts[number] if number < len(prompts) else None
        if not isinstance(prompt, str) or prompt_digest(prompt).hex() != digest_hex(
            self.prompts.digests[item]
        ):
            raise ShardError(
                f"{found.name}: its caption was changed while precompute was running; run again, "
                "finished shards are kept"
            )
        return prompt

    def about(self, product: ProductPlan, item: int) -> dict[str, Any]:
        """Return the JSON member of an image's or a conditioning image's record."""
        about = plan.about_image(
            product.contents[item, :2],
            mirrored=self.is_mirrored(item),
            held_out=bool(self.held_out[self.row_of(item)]),
        )
        if product is self.conditioning:
            about["conditioning_hash"] = digest_hex(product.contents[item, 2:])
        return about

    def captions(self, shard: ShardPlan) -> dict[str, list[str]]:
        """Return, for a shard of latents, the keys of the prompts by that of the image."""
        ends = self.inventory.caption_ends
        found = {}
        for at, item in enumerate(shard.items):
            row = self.row_of(int(item))
            numbers = self.prompts.numbers[ends[row] : ends[row + 1]]
            found[shard.key(at, self.latents.ids)] = [
                plan.key(*map(int, self.text_addresses[number])) for number in numbers
            ]
        return found

    def pairs_of(self, shard: int) -> list[ValidationPair]:
        """Return the validation pairs of a shard."""
        return [self.pairs[int(item)] for item in self.validation.shard(shard).items]

    def sealing_plan(self) -> ExpectedCache:
        """Return what the cache must hold to be complete."""
        return ExpectedCache(
            products={
                folder: ExpectedProduct(
                    dict(product.identity),
                    list(product.fingerprints),
                    list(product.captions),
                    [] if product is self.text else product.buckets,
                )
                for folder, product in self.products().items()
            },
            conditioning_name=self.config.conditioning_name,
            text_spec=self.text_spec,
            latent_spec=self.latent_spec,
            conditioning_spec=self.conditioning_spec,
            buckets=self.latent_settings.grids(self.latent_spec.vae_scale_factor),
            held_out=self.latents.held_out,
            made_by={
                "base": self.config.pretrained_model_name_or_path,
                "revision": self.config.revision,
                "versions": versions(),
            },
        )


def prepare(config: PrecomputeConfig) -> Job:
    """Open and check the source and the base model, hash what they hold, and plan the shards.

    Raises:
        ConfigError: the source or base model cannot be used.
        ShardError: too many of the source's files are missing.
    """
    cache = config.cache
    _check_output(cache)
    part = find_part(config.part, os.environ)
    device = pick_device(config.device or _device_of_this_process())
    annotator, drawn = (
        find_annotator(config.conditioning_from)
        if config.conditioning_from
        else (
            None,
            [],
        )
    )
    source = open_source(config.source_settings())
    base = find_base(
        config.pretrained_model_name_or_path,
        (*COMPONENTS, "vae"),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    text_settings = TextSettings(config.max_sequence_length, config.text_dtype, config.cache_dtype)
    side = config.resolution
    latent_settings = LatentSettings(
        side,
        bucket_shapes(side) if config.buckets else [(side, side)],
        config.posterior,
        config.vae_dtype,
        config.cache_dtype,
        config.background,
    )
    texts = text_spec(base, text_settings)
    latents = latent_spec(base, latent_settings, "-1_1")
    conditioning = latent_spec(base, latent_settings, config.conditioning_range)
    pairs = find_pairs(config, latent_settings.shapes)
    remembered = DigestCache(cache / HASHES, keep=not config.dry_run)
    text_id = text_identity(base, config.variant, text_settings, remembered)
    latent_id = latent_identity(base, config.variant, latent_settings, remembered)
    control_id = {**latent_id, "conditioning_range": config.conditioning_range, "drawn_by": drawn}

    rows = chosen(len(source), config.max_train_samples, config.seed)
    inventory = take_inventory(source, rows, remembered, conditioning=annotator is None)
    bad = BadRows(len(rows), 0.0 if config.strict else config.max_bad_fraction)
    bad.add(bad_rows(source, inventory))

    held_out = held_out_rows(inventory, config.validation_rows, config.seed)
    grids = latent_settings.grids(latents.vae_scale_factor)
    before = layouts_before(cache, {"text": text_id, "latents": latent_id})
    prompts = plan.distinct_prompts(inventory)
    text = plan.plan_text(
        cache / "text", prompts, text_id, texts.tensor_specs(), config.shard_mb, before["text"]
    )
    copies = 2 if config.random_flip else 1
    contents = plan.image_contents(inventory, held_out, mirrored=config.random_flip)
    latent = plan.plan_latents(
        cache / "latents",
        contents,
        np.repeat(nearest_buckets(inventory.sizes, latent_settings.shapes), copies),
        np.repeat(held_out, copies),
        latent_id,
        [latents.tensor_specs("latent", grid) for grid in grids],
        config.shard_mb,
        before["latents"],
    )
    captions = plan.captions_of_shards(latent, inventory, prompts, text)
    latent = plan.with_captions(latent, captions)
    name = config.conditioning_name
    control = plan.plan_conditioning(
        cache / conditioning_folder(name),
        latent,
        np.repeat(inventory.conditionings, copies, axis=0),
        control_id,
    )
    pair_bytes = [
        record_bytes(texts.tensor_specs())
        + record_bytes(latents.tensor_specs("latent", grid))
        + 3 * shape[0] * shape[1]
        for grid, shape in zip(grids, latent_settings.shapes, strict=True)
    ]
    return Job(
        config=config,
        part=part,
        source=source,
        remembered=remembered,
        base=base,
        device=device,
        bad=bad,
        annotator=annotator,
        text_settings=text_settings,
        latent_settings=latent_settings,
        text_spec=texts,
        latent_spec=latents,
        conditioning_spec=conditioning,
        inventory=inventory,
        held_out=held_out,
        prompts=prompts,
        text_addresses=plan.text_addresses(text),
        pairs=pairs,
        text=text,
        latents=latent,
        conditioning=control,
        validation=plan_validation(
            cache / validation_folder(name),
            pairs,
            {"text": text_id, "conditioning": control_id},
            pair_bytes,
        ),
    )


def _device_of_this_process() -> str | None:
    """Return the GPU of a process that `accelerate launch` started beside others, or None."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if local_rank and torch.cuda.is_available() else None


def _check_output(cache: Path) -> None:
    """Refuse to write among files that are not a cache's."""
    ours = {
        "text",
        "latents",
        "conditioning",
        "validation",
        RUN,
        manifest.MANIFEST,
        manifest.PREVIOUS,
        PLAN,
        HASHES,
        f"{HASHES}.lock",
    }
    if cache.is_dir():
        strange = sorted(
            path.name for path in cache.iterdir() if path.name.split(".tmp-")[0] not in ours
        )
        if strange:
            raise ConfigError(
                f"--cache {cache}: not a cache, it holds {', '.join(strange[:4])}; "
                "give a new or empty folder, or a cache."
            )
