"""The two passes over the data: prompts through the text encoders, images through the VAE."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from tqdm import tqdm

from precompute import images
from precompute.batching import batches
from precompute.fingerprint import hash_bytes
from precompute.images import BadImage
from precompute.job import Job, ValidationPair, validation_key
from precompute.latents import LatentEncoder, finite
from precompute.plan import PlannedRow, ShardPlan, image_key
from precompute.text import LongPrompts, TextEncoders, require_finite, text_records
from shards.ahead import ahead
from shards.errors import ShardError
from shards.records import Record
from shards.sidecar import Skipped
from shards.writer import write_shard

DECODING_THREADS = 4


class Picture(NamedTuple):
    """An image to encode: its name in the source and its hash when the run was planned.

    For a conditioning image also those of the image that it belongs to.
    """

    name: str
    planned_hash: str
    like: str = ""
    like_hash: str = ""


def text_pass(job: Job, check: Callable[[], None]) -> dict[str, dict[str, Tensor]]:
    """Write the unfinished text shards; return the embeddings of the validation prompts.

    The encoders live in this function alone, so that they are gone when it returns.

    Args:
        job: what is to be made.
        check: called after each shard; may end the run.
    """
    todo = job.text.unfinished()
    pairs = [pair for shard in job.validation.unfinished() for pair in shard.items]
    if not todo and not pairs:
        return {}
    config = job.config
    encoders = TextEncoders(job.base, job.text_settings, job.device, config.variant)
    long_prompts = LongPrompts()
    total = sum(len(shard.items) for shard in todo)
    with tqdm(total=total, unit="prompt", desc="text", disable=None) as bar:
        for shard in todo:
            write_shard(
                job.text.folder,
                shard.shard,
                text_records(
                    encoders, shard.shard, shard.items, config.text_batch_size, long_prompts, bar
                ),
                fingerprint=shard.fingerprint,
                num_bytes=job.text.num_bytes(shard),
            )
            check()
    if long_prompts.count:
        click.echo(
            f"  {long_prompts.count} prompts have more T5 tokens than --max-sequence-length "
            f"{config.max_sequence_length} and were cut; the longest has {long_prompts.most_tokens}"
        )
    embeds: dict[str, dict[str, Tensor]] = {}
    for pair in pairs:
        one = {name: tensor[0] for name, tensor in encoders.encode([pair.prompt]).items()}
        require_finite(one, pair.prompt)
        embeds[pair.prompt] = one
    return embeds


def latent_pass(
    job: Job, validation_embeds: dict[str, dict[str, Tensor]], check: Callable[[], None]
) -> None:
    """Write the unfinished latent, conditioning and validation shards.

    Args:
        job: what is to be made.
        validation_embeds: see `text_pass`.
        check: called after each shard; may end the run.
    """
    latents, conditioning = job.latents.unfinished(), job.conditioning.unfinished()
    validation = job.validation.unfinished()
    if not (latents or conditioning or validation):
        return
    config = job.config
    encoder = LatentEncoder(job.base, job.latent_settings, job.device, config.variant)
    total = sum(len(shard.items) for shard in (*latents, *conditioning))
    with tqdm(total=total, unit="image", desc="latents", disable=None) as bar:
        for shard in latents:
            skipped: list[Skipped] = []
            prompts: list[list[str]] = []
            write_shard(
                job.latents.folder,
                shard.shard,
                _latent_records(job, encoder, shard, skipped, prompts, bar),
                fingerprint=shard.fingerprint,
                num_bytes=job.latents.num_bytes(shard),
                skipped=skipped,
                prompts=prompts,
            )
            job.bad.add(skipped)
            check()
        for shard in conditioning:
            skipped = []
            write_shard(
                job.conditioning.folder,
                shard.shard,
                _conditioning_records(job, encoder, shard, skipped, bar),
                fingerprint=shard.fingerprint,
                num_bytes=job.conditioning.num_bytes(shard),
                skipped=skipped,
            )
            job.bad.add(skipped)
            check()
    for shard in validation:
        write_shard(
            job.validation.folder,
            shard.shard,
            _validation_records(job, encoder, shard.items, validation_embeds),
            fingerprint=shard.fingerprint,
            num_bytes=job.validation.num_bytes(shard),
        )


def _latent_records(
    job: Job,
    encoder: LatentEncoder,
    shard: ShardPlan,
    skipped: list[Skipped],
    prompts: list[list[str]],
    bar: "tqdm[Any]",
) -> Iterator[Record]:
    """Yield the latents of a shard's images; note left-out rows and captions as it goes."""
    rows: list[tuple[int, PlannedRow]] = []
    for index, row in enumerate(shard.items):
        if row.fault:
            skipped.append(Skipped(row.row.name, row.fault))
        else:
            rows.append((index, row))
    bar.update(len(shard.items) - len(rows))
    files = [Picture(row.row.image, row.image_hash) for _, row in rows]
    captions = shard.captions(job.prompts)
    for at, tensors in _encode(job, encoder, files, "latent", bar):
        index, row = rows[at]
        if isinstance(tensors, str):
            skipped.append(Skipped(row.row.name, tensors))
            continue
        key = image_key(shard.shard, index, row)
        prompts.append(captions[key])
        yield Record(key, tensors, {"image_hash": row.image_hash})


def _conditioning_records(
    job: Job,
    encoder: LatentEncoder,
    shard: ShardPlan,
    skipped: list[Skipped],
    bar: "tqdm[Any]",
) -> Iterator[Record]:
    """Yield the conditioning latents of those rows of a shard that have a latent."""
    card = job.latents.finished(job.latents.shards[shard.shard])
    if card is None:
        raise ShardError(f"{job.latents.folder}: shard {shard.shard:06d} vanished while working")
    present = set(card.keys)
    rows: list[tuple[str, PlannedRow]] = []
    for index, row in enumerate(shard.items):
        key = image_key(shard.shard, index, row)
        if key not in present:
            continue
        if row.conditioning_fault:
            skipped.append(Skipped(row.row.name, row.conditioning_fault))
        else:
            rows.append((key, row))
    bar.update(len(shard.items) - len(rows))
    files = [
        Picture(row.row.conditioning_image, row.conditioning_hash, row.row.image, row.image_hash)
        for _, row in rows
    ]
    for at, tensors in _encode(job, encoder, files, "conditioning_latent", bar):
        key, row = rows[at]
        if isinstance(tensors, str):
            skipped.append(Skipped(row.row.name, tensors))
            continue
        about = {"image_hash": row.image_hash, "conditioning_hash": row.conditioning_hash}
        yield Record(key, tensors, about)


def _encode(
    job: Job,
    encoder: LatentEncoder,
    files: Sequence[Picture],
    kind: str,
    bar: "tqdm[Any]",
) -> Iterator[tuple[int, dict[str, Tensor] | str]]:
    """Yield (position in `files`, tensors, or the reason why there are none) for each image.

    Batches hold a fixed slice of `files`, whatever fails to decode, so that the rows of a shard
    alone determine its bytes.

    Args:
        job: says where to read, and the size of pictures and batches.
        encoder: the VAE.
        files: the images.
        kind: `latent` or `conditioning_latent`.
        bar: moves on a batch at a time.

    Raises:
        ShardError: a file is not what it was when the run was planned.
    """
    size = job.config.vae_batch_size
    pixel_range = job.conditioning_spec.pixel_range if kind != "latent" else "-1_1"

    def load(index: int) -> Tensor | str:
        picture = files[index]
        data = _read_again(job, picture.name, picture.planned_hash)
        like = None
        try:
            if picture.like:
                like = images.size(_read_again(job, picture.like, picture.like_hash))
            image = images.decode(data, job.config.background)
            return images.to_uint8(images.fit(image, job.config.resolution, like))
        except BadImage as error:
            return f"{picture.name}: {error}"

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        loaded = ahead(pool, load, range(len(files)), lead=2 * size)
        for batch in batches(range(len(files)), size):
            found = [(at, next(loaded)) for at in batch]
            good = {at: pixels for at, pixels in found if isinstance(pixels, Tensor)}
            yield from ((at, reason) for at, reason in found if isinstance(reason, str))
            if good:
                encoded = encoder.encode(torch.stack(list(good.values())), pixel_range, kind)
                for position, at in enumerate(good):
                    tensors = {name: tensor[position] for name, tensor in encoded.items()}
                    yield (
                        at,
                        tensors if finite(tensors) else f"{files[at].name}: {kind} is not finite",
                    )
            bar.update(len(batch))


def _read_again(job: Job, name: str, planned_hash: str) -> bytes:
    """Return the bytes of an image, which the plan has read before.

    Raises:
        ShardError: they cannot be read now, or are others. The shard's fingerprint vouches for
            what was planned, so nothing else may go into it.
    """
    try:
        data = job.source.read(name)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ShardError(
            f"{job.config.source}: {name} could be read when the run was planned and cannot now "
            f"({reason}); run again, finished shards are kept"
        ) from error
    if hash_bytes(data) != planned_hash:
        raise ShardError(
            f"{job.config.source}: {name} was changed while precompute was running; run again, "
            "finished shards are kept"
        )
    return data


def _validation_records(
    job: Job,
    encoder: LatentEncoder,
    pairs: Sequence[ValidationPair],
    embeds: dict[str, dict[str, Tensor]],
) -> Iterator[Record]:
    pixel_range = job.conditioning_spec.pixel_range
    for row, pair in enumerate(pairs):
        pixels = pair.conditioning_image[None]
        latent = encoder.encode(pixels, pixel_range, "conditioning_latent")
        tensors = {name: tensor[0] for name, tensor in latent.items()}
        tensors |= {"conditioning_image": pair.conditioning_image} | embeds[pair.prompt]
        yield Record(validation_key(row, pair), tensors, {"prompt": pair.prompt})
