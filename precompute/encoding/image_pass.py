"""The latent pass: unfinished shards of latents, conditioning latents and validation pairs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common.device import AsyncHostCopy
from common.errors import ShardError
from common.interruption import Check
from precompute.encoding.batch_size import BatchSize, find_batch_size
from precompute.encoding.load_image import load_picture
from precompute.encoding.pipeline import Batch, Encoded, EncoderClock, encode_ahead, in_order
from precompute.encoding.shard_build import Work, prepare_work, write_work
from precompute.encoding.vae_encoder import LatentEncoder, finite
from precompute.planning.job import Job
from precompute.planning.plan import ProductPlan
from sd3 import images
from sd3.images import BadImage
from shards.format import sidecar
from shards.format.records import Record
from shards.format.sidecar import Skipped
from shards.format.writer import write_shard

USUAL_BATCH = 8


class Pictures(NamedTuple):
    """The images of a batch, [B, 3, H, W] from 0 to 255, and why some are none, by position."""

    pixels: Tensor | None
    reasons: dict[int, str]


def latent_pass(
    job: Job, validation_embeds: dict[str, dict[str, Tensor]], check: Check, busy: EncoderClock
) -> None:
    """Write the unfinished latent, conditioning and validation shards.

    Args:
        job: what is to be made.
        validation_embeds: see `text_pass`.
        check: called after each shard; may end the run.
        busy: counts the time spent encoding.
    """
    latents, conditioning = job.todo(job.latents), job.todo(job.conditioning)
    validation = job.todo(job.validation)
    if not (latents or conditioning or validation):
        return
    config = job.config
    encoder = LatentEncoder(job.base, job.latent_settings, job.device, config.variant)
    # The largest shape; the others take no more.
    width, height = max(job.latent_settings.shapes, key=lambda shape: shape[0] * shape[1])

    def attempt(count: int) -> object:
        pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        return encoder.encode(pixels, "-1_1", "latent", BatchSize(count))

    size = find_batch_size(config.vae_batch_size, USUAL_BATCH, job.device, attempt)
    total = sum(len(job.latents.shard(shard).items) for shard in latents)
    total += sum(len(job.conditioning.shard(shard).items) for shard in conditioning)
    with tqdm(total=total, unit="image", desc="latents", disable=job.quiet) as bar:
        for product, todo, kind in (
            (job.latents, latents, "latent"),
            (job.conditioning, conditioning, "conditioning_latent"),
        ):
            _encode_product(job, encoder, product, todo, kind, size, bar, check, busy)
    for shard in validation:
        plan = job.validation.shard(shard)
        write_shard(
            job.validation.folder,
            shard,
            _validation_records(job, encoder, shard, validation_embeds, size),
            fingerprint=plan.fingerprint,
            identity=job.validation.identity_digest,
            num_bytes=job.validation.shard_bytes(plan),
        )
        check()


def _encode_product(
    job: Job,
    encoder: LatentEncoder,
    product: ProductPlan,
    todo: Sequence[int],
    kind: str,
    size: BatchSize,
    bar: "tqdm[Any]",
    check: Check,
    busy: EncoderClock,
) -> None:
    """Write the unfinished shards of the latents or of the conditioning latents."""
    controls = kind != "latent"
    pixel_range = job.conditioning_spec.pixel_range if controls else "-1_1"

    def load(batch: Batch) -> Pictures:
        items, bucket = batch.work.plan.items, batch.work.plan.bucket
        width, height = job.latent_settings.shapes[bucket]
        pixels, reasons = None, {}
        for at, place in batch.wanted.items():
            try:
                picture = load_picture(job, int(items[at]), (width, height), controls=controls)
            except BadImage as error:
                reasons[at] = str(error)
                continue
            if pixels is None:
                pixels = torch.zeros(
                    (batch.size, 3, height, width),
                    dtype=torch.uint8,
                    pin_memory=job.device.type == "cuda",
                )
            pixels[place] = images.to_uint8(picture)
        return Pictures(pixels, reasons)

    def encode(loaded: Pictures) -> AsyncHostCopy | None:
        if loaded.pixels is None:
            return None
        return encoder.encode(loaded.pixels, pixel_range, kind, size)

    def records(found: Encoded[Pictures]) -> Iterator[Record]:
        work, reasons = found.batch.work, found.loaded.reasons
        tensors = found.tensors.wait() if found.tensors else {}
        for at, place in found.batch.wanted.items():
            one = {name: tensor[place] for name, tensor in tensors.items()}
            reason = reasons.get(at) or ("" if finite(one) else f"{kind} is not finite")
            if reason:
                work.skipped.append(Skipped(job.row_name(int(work.plan.items[at])), reason))
            else:
                # A record of its own, not a view that keeps the whole batch.
                yield Record(work.keys[at], one, job.about(product, int(work.plan.items[at])))

    def works() -> Iterator[Work]:
        for shard in todo:
            work = prepare_work(product, shard, lambda item: job.about(product, item))
            _leave_out(job, work, controls=controls)
            yield work

    for work, encoded in encode_ahead(
        works(),
        load,
        encode,
        batch_size=size,
        num_threads=job.config.dataloader_num_workers,
        busy=busy,
    ):
        write_work(
            work,
            in_order(encoded, records, bar),
            None if controls else job.captions(work.plan),
        )
        job.bad.add(work.skipped)
        check()


def _leave_out(job: Job, work: Work, *, controls: bool) -> None:
    """Take rows out of a shard's work that are known to be of no use, and say why."""
    present = None
    if controls:
        # A conditioning image without its image is no sample.
        card = sidecar.load(job.latents.folder, work.plan.shard)
        if card is None:
            raise ShardError(
                f"{job.latents.folder}: shard {work.plan.shard:06d} vanished while working"
            )
        present = set(card.keys)
    faults = job.inventory.conditioning_faults if controls else job.inventory.faults
    for at, item in enumerate(work.plan.items):
        reason = faults.get(job.row_of(int(item)))
        if present is not None and work.keys[at] not in present:
            work.leave_out(at, None)
        elif reason:
            work.leave_out(at, Skipped(job.row_name(int(item)), reason))


def _validation_records(
    job: Job,
    encoder: LatentEncoder,
    shard: int,
    embeds: dict[str, dict[str, Tensor]],
    size: BatchSize,
) -> Iterator[Record]:
    pixel_range = job.conditioning_spec.pixel_range
    plan = job.validation.shard(shard)
    for at, item in enumerate(plan.items):
        pair = job.pairs[int(item)]
        pixels = pair.conditioning_image[None]
        latent = encoder.encode(pixels, pixel_range, "conditioning_latent", size).wait()
        tensors = {name: tensor[0] for name, tensor in latent.items()}
        tensors |= {"conditioning_image": pair.conditioning_image} | embeds[pair.prompt]
        yield Record(plan.key(at, job.validation.ids), tensors, {"prompt": pair.prompt})
