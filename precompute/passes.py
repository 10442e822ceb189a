"""The two passes over the data: prompts through the text encoders, images through the VAE."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm
from xxhash import xxh3_128_digest

from precompute import images
from precompute.batch_size import BatchSize, find_batch_size
from precompute.images import BadImage
from precompute.inventory import digest_hex
from precompute.job import Job
from precompute.latents import LatentEncoder, finite
from precompute.plan import ProductPlan
from precompute.sources import Kind
from precompute.stream import Batch, Busy, Encoded, Work, encode_ahead, prepare_work
from precompute.text import LongPrompts, TextEncoders, Tokens, require_finite
from shards import sidecar
from shards.errors import ShardError
from shards.records import Members, Record
from shards.sidecar import Skipped
from shards.writer import write_shard

USUAL_TEXT_BATCH, USUAL_VAE_BATCH = 32, 8
Check = Callable[[], None]


class Prompts(NamedTuple):
    """The prompts of a batch that are to be encoded, by position, and the tokens of all of it."""

    prompts: dict[int, str]
    tokens: Tokens | None


class Pictures(NamedTuple):
    """The images of a batch, [B, 3, H, W] from 0 to 255, and why some are none, by position."""

    pixels: Tensor | None
    reasons: dict[int, str]


def text_pass(job: Job, check: Check, busy: Busy) -> dict[str, dict[str, Tensor]]:
    """Write the unfinished text shards; return the embeddings of the validation prompts.

    The encoders live in this function alone, so that they are gone when it returns.

    Args:
        job: what is to be made.
        check: called after each shard; may end the run.
        busy: counts the time spent encoding.
    """
    todo = job.todo(job.text)
    pairs = [pair for shard in job.todo(job.validation) for pair in job.pairs_of(shard)]
    if not todo and not pairs:
        return {}
    config = job.config
    encoders = TextEncoders(
        job.base, job.text_settings, job.device, config.variant, compiled=config.compile
    )
    size = find_batch_size(
        config.text_batch_size,
        USUAL_TEXT_BATCH,
        job.device,
        lambda count: encoders.encode(encoders.tokenize([""] * count), BatchSize(count)),
    )
    long_prompts = LongPrompts()

    def load(batch: Batch) -> Prompts:
        items = batch.work.plan.items
        prompts = {at: job.prompt(int(items[at])) for at in batch.wanted}
        if not prompts:
            return Prompts(prompts, None)
        whole = [""] * batch.size
        for at, place in batch.wanted.items():
            whole[place] = prompts[at]
        return Prompts(prompts, encoders.tokenize(whole))

    def records(found: Encoded[Prompts]) -> Iterator[Record | Members]:
        tensors = found.tensors.wait() if found.tensors else {}
        for at, place in found.batch.wanted.items():
            one = {name: tensor[place] for name, tensor in tensors.items()}
            prompt = found.loaded.prompts[at]
            require_finite(one, prompt)
            if found.loaded.tokens:
                long_prompts.add(found.loaded.tokens.t5_lengths[place], config.max_sequence_length)
            yield Record(found.batch.work.keys[at], one, {"prompt": prompt})

    works = _works(job.text, todo, lambda item: {"prompt": job.prompt(item)})
    total = sum(len(job.text.shard(shard).items) for shard in todo)
    with tqdm(total=total, unit="prompt", desc="text", disable=job.quiet) as bar:
        for work, encoded in encode_ahead(
            works,
            load,
            lambda loaded: encoders.encode(_present(loaded.tokens), size),
            is_empty=lambda loaded: loaded.tokens is None,
            batch_size=size,
            num_threads=1,  # tokenizers are not for two threads at once
            busy=busy,
        ):
            _write(work, _in_order(encoded, records, bar))
            check()
    if long_prompts.count:
        job.say(
            f"  {long_prompts.count} prompts have more T5 tokens than --max-sequence-length "
            f"{config.max_sequence_length} and were cut; the longest has {long_prompts.most_tokens}"
        )
    embeds: dict[str, dict[str, Tensor]] = {}
    for pair in pairs:
        found = encoders.encode(encoders.tokenize([pair.prompt]), size).wait()
        one = {name: tensor[0] for name, tensor in found.items()}
        require_finite(one, pair.prompt)
        embeds[pair.prompt] = one
    return embeds


def latent_pass(
    job: Job, validation_embeds: dict[str, dict[str, Tensor]], check: Check, busy: Busy
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
    encoder = LatentEncoder(
        job.base, job.latent_settings, job.device, config.variant, compiled=config.compile
    )
    # The largest shape; the others take no more.
    width, height = max(job.latent_settings.shapes, key=lambda shape: shape[0] * shape[1])

    def attempt(count: int) -> object:
        pixels = torch.zeros(count, 3, height, width, dtype=torch.uint8)
        return encoder.encode(pixels, "-1_1", "latent", BatchSize(count))

    size = find_batch_size(config.vae_batch_size, USUAL_VAE_BATCH, job.device, attempt)
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
    busy: Busy,
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
                picture = _picture(job, int(items[at]), (width, height), controls=controls)
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

    def records(found: Encoded[Pictures]) -> Iterator[Record | Members]:
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
        lambda loaded: encoder.encode(_present(loaded.pixels), pixel_range, kind, size),
        is_empty=lambda loaded: loaded.pixels is None,
        batch_size=size,
        num_threads=job.config.dataloader_num_workers,
        busy=busy,
    ):
        _write(work, _in_order(encoded, records, bar), job)
        job.bad.add(work.skipped)
        check()


def _works(
    product: ProductPlan, todo: Sequence[int], about: Callable[[int], dict[str, Any]]
) -> Iterator[Work]:
    return (prepare_work(product, shard, about) for shard in todo)


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
    for at, item in enumerate(work.plan.items):
        row = job.row_of(int(item))
        reason = job.inventory.faults.get(row, "")
        if present is not None and work.keys[at] not in present:
            work.kept.pop(at, None)
            work.wanted.discard(at)
            continue
        if controls:
            reason = job.inventory.conditioning_faults.get(row, "")
        if reason:
            work.kept.pop(at, None)
            work.wanted.discard(at)
            work.skipped.append(Skipped(job.row_name(int(item)), reason))


def _in_order(
    encoded: Iterator[Encoded[Any]],
    records: Callable[[Encoded[Any]], Iterator[Record | Members]],
    bar: "tqdm[Any]",
) -> Iterator[Record | Members]:
    """Yield the records of a shard by their rows, those that are kept in between."""
    with contextlib.ExitStack() as tar_of_old:
        tar = None
        for found in encoded:
            work = found.batch.work
            made = {record.key: record for record in records(found)}
            for at in found.batch.positions:
                if at in work.kept:
                    tar = tar or tar_of_old.enter_context(
                        sidecar.tar_path(work.product.folder, work.plan.shard).open("rb")
                    )
                    members = work.kept[at].read(tar)
                    if members is None:
                        raise ShardError(
                            f"{tar.name}: changed while precompute was running; run again"
                        )
                    yield members
                elif work.keys[at] in made:
                    yield made[work.keys[at]]
            bar.update(len(found.batch.positions))


def _write(work: Work, records: Iterator[Record | Members], job: Job | None = None) -> None:
    """Write a shard; with a job, and of latents, also which prompts caption its images."""
    prompts: list[list[str]] = []
    captions = job.captions(work.plan) if job is not None and work.plan.captions else None

    def noted() -> Iterator[Record | Members]:
        for record in records:
            if captions is not None:
                prompts.append(captions[record.key])
            yield record

    write_shard(
        work.product.folder,
        work.plan.shard,
        noted(),
        fingerprint=work.plan.fingerprint,
        identity=work.product.identity_digest,
        num_bytes=work.product.shard_bytes(work.plan),
        skipped=work.skipped,
        prompts=prompts,
        captions=work.plan.captions,
    )


def _picture(job: Job, item: int, size_px: tuple[int, int], *, controls: bool) -> Image.Image:
    """Return an image, or a conditioning image, as it is to be encoded.

    Raises:
        BadImage: it is none, or its conditioning image is of another shape.
    """
    row = job.row_of(item)
    background = job.config.background

    def decoded(kind: Kind) -> Image.Image:
        try:
            return images.decode(_read_again(job, row, kind), background)
        except BadImage as error:
            raise BadImage(f"{job.file_name(row, kind)}: {error}") from error

    if controls and job.annotator is None:
        control = decoded("conditioning_image")
        like = images.size(_read_again(job, row, "image"))
        try:
            picture = images.fit(control, size_px, like)
        except BadImage as error:
            raise BadImage(f"{job.file_name(row, 'conditioning_image')}: {error}") from error
    else:
        picture = images.fit(decoded("image"), size_px)
    if job.is_mirrored(item):
        picture = ImageOps.mirror(picture)
    if controls and job.annotator is not None:
        picture = images.annotated(picture, job.annotator)
    return picture


def _read_again(job: Job, row: int, kind: Kind) -> bytes:
    """Return the bytes of an image, which the inventory has read before.

    Raises:
        ShardError: they cannot be read now, or are others. The shard's fingerprint vouches for
            what was planned, so nothing else may go into it.
    """
    name = job.file_name(row, kind)
    try:
        data = job.source.read(int(job.inventory.rows[row]), kind)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ShardError(
            f"{name} could be read when the run was planned and cannot now "
            f"({reason}); run again, finished shards are kept"
        ) from error
    planned = job.inventory.images if kind == "image" else job.inventory.conditionings
    if xxh3_128_digest(data).hex() != digest_hex(planned[row]):
        job.remembered.forget()
        raise ShardError(
            f"{name} was changed while precompute was running; run again, finished shards are kept"
        )
    return data


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


def _present(value: Any) -> Any:
    assert value is not None
    return value
