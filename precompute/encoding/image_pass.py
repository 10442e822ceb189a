"""The image pass: images and conditioning images through the VAE, then the validation pairs."""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from common.errors import ShardError
from common.interruption import StopCheck
from common.progress import Progress
from precompute.encoding.batch_size import BatchSize, find_batch_size
from precompute.encoding.drawn_controls import DrawnShard, drawn_path
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.load_image import SourceImages
from precompute.encoding.pipeline import Batch, build_shards
from precompute.encoding.shard_build import ShardBuild, prepare_build
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.planning.context import Context
from precompute.sources.source import Kind
from sd3.image_files import BadImage
from sd3.pixels import to_uint8
from sd3.value_scale import AS_IS
from shards.format import sidecar
from shards.format.records import Record
from shards.format.sidecar import Skipped
from shards.format.writer import write_shard

USUAL_BATCH = 8


class LoadedImages(NamedTuple):
    """The images of a batch, and why some of them cannot be used, by position.

    Pixels are [B, 3, H, W], 0 to 255, and 0 in slots that are not encoded; None without images. The
    conditioning images of inpainting have a fourth channel, see `sd3.inpainting`.
    """

    pixels: Tensor | None
    reasons: dict[int, str]


class ImagePass:
    """How the records of latents or of conditioning latents are made: an `EncodingPass`.

    Args:
        context: of the run.
        source_images: read for both kinds.
        encoder: the VAE's encoder.
        batch_size: of the encoder.
        kind: which of a row's images are encoded.
    """

    def __init__(
        self,
        context: Context,
        source_images: SourceImages,
        encoder: VaeEncoder,
        batch_size: BatchSize,
        kind: Kind,
    ) -> None:
        products, inventory = context.products, context.inventory
        self.context = context
        self.source_images = source_images
        self.device = context.device
        self.encoder = encoder
        self.batch_size = batch_size
        self.kind = kind
        self.num_loaders = context.config.num_loaders
        in_batches = context.annotator is not None and context.annotator.in_batches
        self.is_drawn = in_batches and kind == "conditioning_image"
        self._drawn: DrawnShard | None = None  # of the shard that is loaded
        self._lock = threading.Lock()
        if kind == "image":
            self.product, self.faults = products.latents, inventory.faults
            self.name, self.tensor_name, self.pixel_range = "latents", "latent", "-1_1"
        else:
            self.product, self.faults = products.conditioning, inventory.conditioning_faults
            self.name, self.tensor_name = "conditioning latents", "conditioning_latent"
            self.pixel_range = context.specs.conditioning.pixel_range

    def prepare(self, shard: int) -> ShardBuild:
        """Return the build of a shard, without the rows that are known to be bad.

        Raises:
            ShardError: the shard of the latents has vanished.
        """
        context = self.context
        build = prepare_build(
            self.product, shard, lambda item: context.metadata(self.product, item)
        )
        if self.kind == "image":
            build.caption_keys = context.caption_keys(build.plan)
            latent_keys = set(build.keys)
        else:
            latent_keys = self._latent_keys(shard)
            if self.is_drawn:
                build.obsolete = [drawn_path(build)]
        for position, item in enumerate(build.plan.items):
            row = context.row_of(int(item))
            if build.keys[position] not in latent_keys:
                build.leave_out(position)  # the latents' sidecar says why
            elif row in self.faults:
                build.leave_out(position)
                build.skipped[row] = Skipped(context.row_name(int(item)), self.faults[row])
        return build

    def _latent_keys(self, shard: int) -> set[str]:
        """Return the keys of a shard's latents; without one, a conditioning image is no sample."""
        folder = self.context.products.latents.folder
        latents = sidecar.load(folder, shard)
        if latents is None:
            raise ShardError(f"{folder}: shard {shard:06d} vanished while working")
        return set(latents.keys)

    def load(self, batch: Batch) -> LoadedImages:
        """Return the images of a batch."""
        plan = batch.build.plan
        width, height = self.context.specs.latent_settings.shapes[plan.bucket]
        pixels, reasons = None, {}
        drawn = self._drawn_shard(batch.build) if self.is_drawn else None
        for position, index in batch.to_encode.items():
            item = int(plan.items[position])
            try:
                if drawn is not None:
                    image = drawn.image(position)
                    self.source_images.note_values(item, image, AS_IS)
                else:
                    image = self.source_images.load(item, (width, height), self.kind)
            except BadImage as error:
                reasons[position] = str(error)
                continue
            if pixels is None:
                pixels = torch.zeros(
                    (batch.size, len(image.getbands()), height, width),
                    dtype=torch.uint8,
                    pin_memory=self.device.type == "cuda",
                )
            pixels[index] = to_uint8(image)
        return LoadedImages(pixels, reasons)

    def _drawn_shard(self, build: ShardBuild) -> DrawnShard:
        """Return what reads the drawn images of a shard, the same for all its batches."""
        with self._lock:
            if self._drawn is None or self._drawn.build is not build:
                self._drawn = DrawnShard(build)
            return self._drawn

    def encode(self, loaded: LoadedImages) -> dict[str, Tensor] | None:
        """Return the latents of a batch."""
        if loaded.pixels is None:
            return None
        return self.encoder.encode(
            loaded.pixels, self.pixel_range, self.tensor_name, self.batch_size
        )

    def records(
        self,
        batch: Batch,
        loaded: LoadedImages,
        tensors: dict[str, Tensor],
        finite: dict[str, Tensor],
    ) -> Iterator[Record]:
        """Yield the records of a batch; note the rows that cannot be used."""
        build = batch.build
        for position, index in batch.to_encode.items():
            item = int(build.plan.items[position])
            latent = {name: tensor[index] for name, tensor in tensors.items()}
            reason = loaded.reasons.get(position)
            if not reason and not all(bool(each[index]) for each in finite.values()):
                reason = f"{self.tensor_name} is not finite"
            if reason:
                row = self.context.row_of(item)
                build.skipped[row] = Skipped(self.context.row_name(item), reason)
            else:
                metadata = self.context.metadata(self.product, item)
                yield Record(build.keys[position], latent, metadata)


def encode_images(
    context: Context,
    validation_embeds: dict[str, dict[str, Tensor]],
    check: StopCheck,
    clock: EncoderClock,
) -> None:
    """Build the missing shards of latents, conditioning latents and validation pairs.

    Args:
        context: of the run.
        validation_embeds: embeddings of the validation prompts by prompt, from `encode_text`.
        check: called between shards; may end the run.
        clock: measures the time spent encoding.
    """
    products = context.products
    latents = context.shards_to_build(products.latents)
    conditioning = context.shards_to_build(products.conditioning)
    validation = context.shards_to_build(products.validation)
    if not (latents or conditioning or validation):
        return
    specs, config = context.specs, context.config
    encoder = VaeEncoder.load(specs.base, specs.latent_settings, context.device, config.variant)
    width, height = specs.latent_settings.largest_shape  # the others take no more memory

    def attempt(count: int) -> object:
        pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        return encoder.encode(pixels, "-1_1", "latent", BatchSize(count, may_shrink=False))

    total = products.latents.count_records(latents)
    total += products.conditioning.count_records(conditioning)
    size = find_batch_size(config.vae_batch_size, USUAL_BATCH, context.device, attempt, most=total)
    source_images = SourceImages(context)
    with Progress(total, "image", "images", quiet=context.quiet) as bar:
        for image_pass, shards in (
            (ImagePass(context, source_images, encoder, size, "image"), latents),
            # After all latents, since it reads their sidecars.
            (ImagePass(context, source_images, encoder, size, "conditioning_image"), conditioning),
        ):
            build_shards(
                image_pass,
                shards,
                bad_rows=context.bad_rows,
                clock=clock,
                check=check,
                advance=bar.update,
            )
    unseen = source_images.control_values.describe_unseen(context)
    for line in [*unseen, *size.describe("images")]:
        context.print(f"  {line}")
    for shard in validation:
        records = _validation_records(context, encoder, shard, validation_embeds, size)
        plan = products.validation.shard(shard)
        write_shard(
            products.validation.folder,
            shard,
            records,
            fingerprint=plan.fingerprint,
            identity=products.validation.identity_digest,
            num_bytes=products.validation.shard_bytes(plan),
        )
        check()


def _validation_records(
    context: Context,
    encoder: VaeEncoder,
    shard: int,
    embeds: dict[str, dict[str, Tensor]],
    size: BatchSize,
) -> Iterator[Record]:
    """Yield the records of a shard of validation pairs."""
    validation, pixel_range = context.products.validation, context.specs.conditioning.pixel_range
    plan = validation.shard(shard)
    for position, pair in enumerate(context.pairs_of(shard)):
        pixels = pair.conditioning_image[None]
        latent = encoder.encode(pixels, pixel_range, "conditioning_latent", size)
        tensors = {name: tensor[0].cpu() for name, tensor in latent.items()}
        tensors |= {"conditioning_image": pair.conditioning_image} | embeds[pair.prompt]
        yield Record(plan.key(position, validation.ids), tensors, {"prompt": pair.prompt})
