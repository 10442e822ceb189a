"""The context of a precompute run: everything that is known before the first byte is written."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageColor

from common.errors import ShardError
from common.provenance import versions
from precompute.config import PrecomputeConfig
from precompute.fingerprints.annotator_spec import annotator_spec
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.encoder_spec import EncoderSpecs
from precompute.planning.bad_rows import BadRows
from precompute.planning.existing_layout import reasons_to_build
from precompute.planning.inventory import Inventory, digest_hex, prompt_digest
from precompute.planning.plan import ProductPlan, ShardPlan, bytes_needed, item_key
from precompute.planning.products import Prompts, image_metadata, text_addresses
from precompute.planning.validation_pairs import ValidationPair
from precompute.planning.views.listing import Views
from precompute.planning.views.random_crops import Box
from precompute.planning.workers import Part
from precompute.sources.kept_images import KeptImages
from precompute.sources.source import Kind, printable
from sd3.annotators.annotator import Annotator
from sd3.buckets import nearest_buckets
from shards.format.expected_cache import ExpectedCache, ExpectedProduct
from shards.format.manifest import conditioning_folder, validation_folder
from shards.format.sidecar import Summary
from shards.format.specs import AnnotatorSpec

# Of a PNG: a grey map takes half of it, one in colour up to three times as much.
DRAWN_BYTES_A_PIXEL = 1


@dataclass(frozen=True)
class Products:
    """The plans of all products of a run."""

    text: ProductPlan
    latents: ProductPlan
    conditioning: ProductPlan
    validation: ProductPlan


@dataclass(frozen=True)
class Context:
    """The settings, the source, the encoders' specifications and the plans of a run.

    Attributes:
        config: the settings.
        part: which shards this worker builds.
        device: where the encoders run.
        source: the data set.
        annotator: draws conditioning images from images; None if the source has them.
        digests: of files that were hashed.
        specs: what the encoders compute.
        inventory: of the chosen rows.
        held_out: which rows are held out of training, [N].
        views: of each row's picture, which the latents are of.
        bad_rows: the rows that cannot be used.
        prompts: the distinct prompts.
        pairs: the validation pairs.
        products: the plans.
    """

    config: PrecomputeConfig
    part: Part
    device: torch.device
    source: KeptImages
    annotator: Annotator | None
    digests: DigestCache
    specs: EncoderSpecs
    inventory: Inventory
    held_out: NDArray[np.bool_]
    views: Views
    bad_rows: BadRows
    prompts: Prompts
    pairs: list[ValidationPair]
    products: Products

    # What is to be built.

    def products_by_folder(self) -> dict[str, ProductPlan]:
        """Return the product plans by folder name, in the order they are built."""
        return {
            "text": self.products.text,
            "latents": self.products.latents,
            conditioning_folder(self.config.conditioning_name): self.products.conditioning,
            validation_folder(self.config.conditioning_name): self.products.validation,
        }

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why shards have to be built, by folder."""
        return reasons_to_build(self.config.cache, self.products_by_folder())

    @cached_property
    def finished(self) -> dict[Path, list[Summary | None]]:
        """The summaries of the shards that were on disk as planned at first use, by folder."""
        return self.finished_now()

    def finished_now(self) -> dict[Path, list[Summary | None]]:
        """Return the summaries of the shards that are on disk as planned, by folder."""
        return {
            product.folder: [product.finished(shard) for shard in range(product.num_shards)]
            for product in self.products_by_folder().values()
        }

    def shards_to_build(self, product: ProductPlan) -> list[int]:
        """Return the shards of this worker that were not on disk as planned."""
        shards = enumerate(self.finished[product.folder])
        return [shard for shard, summary in shards if summary is None and self.part.has(shard)]

    def bytes_needed(self) -> int:
        """Return how much room this worker's shards need on the disk."""
        products = self.products_by_folder().values()
        shards = bytes_needed(
            (product, shard) for product in products for shard in self.shards_to_build(product)
        )
        return shards + self.drawn_bytes()

    def drawn_bytes(self) -> int:
        """Return about how much room conditioning images take until the VAE has encoded them."""
        if self.annotator is None or not self.annotator.in_batches:
            return 0
        conditioning, shapes = self.products.conditioning, self.specs.latent_settings.shapes
        plans = (conditioning.shard(shard) for shard in self.shards_to_build(conditioning))
        return sum(
            DRAWN_BYTES_A_PIXEL * len(plan.items) * width * height
            for plan in plans
            for width, height in [shapes[plan.bucket]]
        )

    def outdated_captions(self) -> list[int]:
        """Return this worker's finished latent shards whose sidecars list other captions."""
        latents = self.products.latents
        shards = zip(self.finished[latents.folder], latents.captions, strict=True)
        return [
            shard
            for shard, (summary, captions) in enumerate(shards)
            if summary is not None and summary.captions != captions and self.part.has(shard)
        ]

    # Output for people.

    @property
    def quiet(self) -> bool:
        """Whether another worker prints for this one."""
        return not self.part.leads and self.config.part is None

    def print(self, text: str) -> None:
        """Print a line, once for all workers of a launch."""
        if not self.quiet:
            click.echo(text)

    # From items to rows and records. An item of the latents is a view of a row's picture.

    def row_of(self, item: int) -> int:
        """Return the inventory's row of a view."""
        return int(self.views.rows[item])

    def crop_of(self, item: int) -> Box | None:
        """Return where a view lies in its picture; None for a centre crop, or without a picture."""
        row, number = self.row_of(item), int(self.views.crops[item])
        width, height = map(int, self.inventory.sizes[row])
        if not (number and width and height):
            return None
        shapes = self.specs.latent_settings.shapes
        (bucket,) = nearest_buckets(self.inventory.sizes[row : row + 1], shapes)
        picture = digest_hex(self.inventory.images[row])
        return self.config.random_crops.box(picture, number, (width, height), shapes[bucket])

    def row_name(self, item: int) -> str:
        """Return the name of an image's row in reports."""
        (row,) = self.source.rows([int(self.inventory.rows[self.row_of(item)])])
        return row.name

    def file_name(self, row: int, kind: Kind) -> str:
        """Return the name of a row's image in errors."""
        (source_row,) = self.source.rows([int(self.inventory.rows[row])])
        name = source_row.image if kind == "image" else source_row.conditioning_image
        return printable(name) or f"{source_row.where}, {kind}"

    def prompt(self, item: int) -> str:
        """Return a prompt of the text product.

        Raises:
            ShardError: the source's caption is another than when the run was planned.
        """
        caption = int(self.prompts.first[item]) - 1
        if caption < 0:
            return ""
        row = int(np.searchsorted(self.inventory.caption_ends, caption, side="right")) - 1
        (source_row,) = self.source.rows([int(self.inventory.rows[row])])
        prompts = source_row.prompts
        number = caption - int(self.inventory.caption_ends[row])
        prompt = prompts[number] if number < len(prompts) else None
        if not isinstance(prompt, str) or prompt_digest(prompt).hex() != digest_hex(
            self.prompts.digests[item]
        ):
            raise ShardError(
                f"{source_row.name}: its caption was changed while precompute was running; "
                "run again, finished shards are kept"
            )
        return prompt

    def metadata(self, product: ProductPlan, item: int) -> dict[str, Any]:
        """Return the JSON member of an image's or a conditioning image's record."""
        row = self.row_of(item)
        metadata = image_metadata(
            self.inventory.images[row],
            mirrored=bool(self.views.mirrored[item]),
            held_out=bool(self.held_out[row]),
            crop=self.crop_of(item),
        )
        is_conditioning = product is self.products.conditioning
        if is_conditioning:
            metadata["conditioning_hash"] = digest_hex(self.inventory.conditionings[row])
            if self.inventory.other_shape[row]:
                metadata["fit"] = self.config.conditioning_fit
        background = list(ImageColor.getrgb(self.config.background))
        over_it = background != product.identity["background"]
        if over_it and self.inventory.transparent[row, int(is_conditioning)]:
            metadata["background"] = background
        return metadata

    @cached_property
    def text_addresses(self) -> Any:
        """Shard, slot and id of each prompt's record, [D, 3]."""
        return text_addresses(self.products.text)

    def caption_keys(self, shard: ShardPlan) -> dict[str, list[str]]:
        """Return, for a shard of latents, the keys of each image's prompts by the image's key."""
        ends = self.inventory.caption_ends
        keys = {}
        for position, item in enumerate(shard.items):
            row = self.row_of(int(item))
            numbers = self.prompts.numbers[ends[row] : ends[row + 1]]
            keys[shard.key(position, self.products.latents.ids)] = [
                item_key(*map(int, self.text_addresses[number])) for number in numbers
            ]
        return keys

    def pairs_of(self, shard: int) -> list[ValidationPair]:
        """Return the validation pairs of a shard."""
        return [self.pairs[int(item)] for item in self.products.validation.shard(shard).items]

    def expected_cache(self) -> ExpectedCache:
        """Return what the cache must hold to be complete."""
        return ExpectedCache(
            products={
                folder: ExpectedProduct(
                    dict(product.identity),
                    list(product.fingerprints),
                    list(product.captions),
                    [] if product is self.products.text else product.buckets,
                )
                for folder, product in self.products_by_folder().items()
            },
            conditioning_name=self.config.conditioning_name,
            text_spec=self.specs.text,
            latent_spec=self.specs.latents,
            conditioning_spec=self.specs.conditioning,
            buckets=self.specs.grids,
            held_out=self.products.latents.held_out,
            made_by={
                "base": without_folders(self.config.pretrained_model_name_or_path),
                "revision": self.config.revision,
                "versions": versions(),
                **({"views": described} if (described := self.config.described_views) else {}),
                **({"loras": [lora.name for lora in self.specs.loras]} if self.specs.loras else {}),
            },
            num_rows=len(self.inventory),
            num_images=self.products.latents.num_records,
            images_per_row=self.config.images_per_row,
            num_held_out=int(self.held_out.sum()),
            max_bad_fraction=self.bad_rows.max_fraction,
            annotator=self._annotator_spec(),
        )

    def _annotator_spec(self) -> AnnotatorSpec | None:
        """Return what the cache says of its annotator."""
        if self.annotator is None:
            return None
        return annotator_spec(self.annotator, self.digests)


def without_folders(name_or_path: str) -> str:
    """Return a base model's id on the hub, or its name without folders: caches are published."""
    path = Path(name_or_path)
    return path.resolve().name if path.exists() else name_or_path
