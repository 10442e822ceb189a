"""The plans of the products: text, latents and conditioning latents.

Axes: N rows of the inventory, P captions, D distinct prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ImageColor
from xxhash import xxh3_128_digest

from precompute.fingerprints.encoder_spec import Identity
from precompute.planning.held_out import HELD_OUT
from precompute.planning.inventory import Inventory, digest_hex, digests_of
from precompute.planning.layout import (
    EMPTY,
    Ids,
    Layout,
    Numbers,
    arrange,
    first_of_each,
    items_of_slots,
)
from precompute.planning.plan import ProductPlan, array_digest
from precompute.planning.views.listing import Views
from precompute.planning.views.random_crops import Box, RandomCrops
from shards.format.json_files import LARGEST_FILE_BYTES
from shards.format.sidecar import SIDECAR_BYTES_A_PROMPT, SIDECAR_BYTES_A_RECORD
from shards.format.tensor_spec import TensorSpec, record_bytes

# Encoders take full batches, of powers of two, from large shards.
LARGE_SHARD, WHOLE_BATCHES = 64, 32
# Of a shard, with one caption each: what a sidecar can list.
MOST_RECORDS = LARGEST_FILE_BYTES // (SIDECAR_BYTES_A_RECORD + SIDECAR_BYTES_A_PROMPT)
# The digest of a mirrored image is the digest of the image with these bits flipped.
MIRROR = np.frombuffer(xxh3_128_digest(b"mirrored"), ">u8").astype(np.uint64)
# The same of an image whose colours were brought to sRGB, which former versions did not do.
TO_SRGB = np.frombuffer(xxh3_128_digest(b"to sRGB"), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of an inventory; the empty prompt is the first.

    Attributes:
        digests: of each prompt, [D, 2].
        first: number of the first caption with each prompt, counted from 1, [D]; 0 for the empty
            prompt.
        numbers: number of each caption's prompt, [P].
    """

    digests: Ids
    first: Numbers
    numbers: Numbers

    def __len__(self) -> int:
        """Return D."""
        return len(self.first)


def distinct_prompts(inventory: Inventory) -> Prompts:
    """Return the empty prompt, then each prompt once, in order of first appearance."""
    captions = np.concatenate([digests_of(iter([""])), inventory.captions])
    first, numbers = first_of_each(captions)
    return Prompts(captions[first], first, numbers[1:])


def plan_text(
    folder: Path,
    prompts: Prompts,
    identity: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    shard_mb: float,
    existing: Layout = EMPTY,
) -> ProductPlan:
    """Return the plan of the text product.

    Args:
        folder: of the product.
        prompts: all prompts that the product holds.
        identity: what the records' bytes depend on besides the prompts.
        tensors: of a record.
        shard_mb: size of a shard, in 10^6 bytes.
        existing: the layout of the cache as it is; items that have a slot keep it.
    """
    sizes = [records_per_shard(shard_mb, tensors)]
    buckets = np.zeros(len(prompts), np.int64)
    layout, slots = arrange(prompts.digests[:, 0], buckets, sizes, existing)
    items = items_of_slots(layout, slots)
    return ProductPlan(folder, identity, layout, items, prompts.digests, [record_bytes(tensors)])


def over_background(
    digests: Ids, transparent: NDArray[np.bool_], identity: Identity, colour: str
) -> Ids:
    """Return the digests of images, [N, 2]; those over another background have their own.

    Only transparent images depend on it. So it is no part of a product's identity, unless a former
    version wrote it there.

    Args:
        digests: of the images' files, [N, 2].
        transparent: which images may have transparent pixels, [N].
        identity: of the product; its background is the one that the digests stand for.
        colour: the background.
    """
    background = list(ImageColor.getrgb(colour))
    if identity["background"] == background:
        return digests
    bits = np.frombuffer(xxh3_128_digest(f"background {background}".encode()), ">u8")
    return np.where(transparent[:, None], digests ^ bits.astype(np.uint64), digests)


def in_srgb(digests: Ids, has_profile: NDArray[np.bool_]) -> Ids:
    """Return the digests of images, [N, 2]; those whose colours are converted have their own.

    Args:
        digests: of the images' files, [N, 2].
        has_profile: which images have a colour profile that changes their colours, [N].
    """
    return np.where(has_profile[:, None], digests ^ TO_SRGB, digests)


def in_other_shape(digests: Ids, other_shape: NDArray[np.bool_], fit: str) -> Ids:
    """Return the digests of conditioning images, [N, 2]; those of another shape have their own.

    Args:
        digests: of the conditioning images' files, [N, 2].
        other_shape: which have another shape than their images, and are used all the same, [N].
        fit: what becomes of these: "stretch" or "crop".
    """
    bits = np.frombuffer(xxh3_128_digest(f"other shape: {fit}".encode()), ">u8")
    return np.where(other_shape[:, None], digests ^ bits.astype(np.uint64), digests)


def image_contents(
    images: Ids, held_out: NDArray[np.bool_], views: Views, crops: RandomCrops
) -> Ids:
    """Return the digest of each view, [V, 2]; held-out images, mirrors and crops have their own.

    Args:
        images: digests of the images of all rows, [N, 2].
        held_out: which rows are held out of training, [N].
        views: of all rows.
        crops: how random ones are drawn.
    """
    contents = np.where(held_out[:, None], images ^ HELD_OUT, images)[views.rows]
    contents = np.where(views.mirrored[:, None], contents ^ MIRROR, contents)
    return contents ^ crops.bits(int(views.crops.max(initial=0)))[views.crops]


def image_metadata(
    content: Any, *, mirrored: bool, held_out: bool, crop: Box | None
) -> dict[str, Any]:
    """Return the part of a latent record's JSON member that identifies its image.

    Args:
        content: digest of the image's file, [2].
        mirrored: whether the image is a mirror.
        held_out: whether the image is held out of training.
        crop: where a random crop lies.
    """
    flags = {"mirrored": mirrored, "held_out": held_out}
    metadata: dict[str, Any] = {"image_hash": digest_hex(content)}
    metadata |= {name: True for name, on in flags.items() if on}
    return metadata | ({} if crop is None else {"crop": list(crop)})


def plan_latents(
    folder: Path,
    contents: Ids,
    buckets: Numbers,
    held_out: NDArray[np.bool_],
    identity: Mapping[str, Any],
    tensors: Sequence[Mapping[str, TensorSpec]],
    shard_mb: float,
    existing: Layout = EMPTY,
) -> ProductPlan:
    """Return the plan of the latents.

    Args:
        folder: of the product.
        contents: the digest of each latent's image, from `image_contents`.
        buckets: of each latent.
        held_out: which latents are held out of training; they get shards of their own.
        identity: what the records' bytes depend on besides the images.
        tensors: of a record, by bucket.
        shard_mb: size of a shard, in 10^6 bytes.
        existing: the layout of the cache as it is; items that have a slot keep it.
    """
    sizes = [records_per_shard(shard_mb, specs) for specs in tensors]
    # Held-out latents of bucket b are arranged as if they were of bucket len(sizes) + b.
    arranged_buckets = buckets + len(sizes) * held_out
    layout, slots = arrange(contents[:, 0], arranged_buckets, [*sizes, *sizes], existing)
    items = items_of_slots(layout, slots)
    bucket_bytes = [record_bytes(specs) for specs in tensors]
    return ProductPlan(folder, identity, layout, items, contents, bucket_bytes)


def plan_conditioning(
    folder: Path,
    latents: ProductPlan,
    conditionings: Ids,
    identity: Mapping[str, Any],
    tensors: Sequence[Mapping[str, TensorSpec]],
) -> ProductPlan:
    """Return the plan of the conditioning latents, which have the slots of their latents.

    Args:
        folder: of the product.
        latents: the plan of the latents.
        conditionings: digest of each latent's conditioning image, [N, 2].
        identity: what the records' bytes depend on besides the images.
        tensors: of a record, by bucket.
    """
    contents = np.concatenate([latents.contents, conditionings], axis=1)
    sizes = [record_bytes(specs) for specs in tensors]
    return ProductPlan(folder, identity, latents.layout, latents.items, contents, sizes)


def with_captions(
    latents: ProductPlan, views: Views, inventory: Inventory, prompts: Prompts, text: ProductPlan
) -> ProductPlan:
    """Return the plan of the latents with a digest of each shard's captions.

    Args:
        latents: the plan without captions.
        views: what the latents are of.
        inventory: of all rows.
        prompts: the distinct prompts of the inventory.
        text: the plan of the text product.
    """
    addresses = text_addresses(text)
    digests = []
    for shard in range(latents.num_shards):
        plan = latents.shard(shard)
        rows = views.rows[plan.items]
        starts, ends = inventory.caption_ends[rows], inventory.caption_ends[rows + 1]
        counts = ends - starts
        # Numbers of the captions of these rows, one row's after the other's.
        offsets = np.repeat(starts - np.cumsum(counts) + counts, counts)
        numbers = prompts.numbers[offsets + np.arange(counts.sum())]
        digests.append(array_digest(b"captions", plan.slots, counts, addresses[numbers]))
    return replace(latents, captions=digests)


def text_addresses(text: ProductPlan) -> Numbers:
    """Return shard, slot and id of each prompt's record, [D, 3]."""
    slots = np.empty(text.num_records, np.int64)
    occupied = np.flatnonzero(text.items >= 0)
    slots[text.items[occupied]] = occupied
    return np.stack([*text.layout.locate(slots), text.ids.astype(np.int64)], axis=1)


def records_per_shard(shard_mb: float, tensors: Mapping[str, TensorSpec]) -> int:
    """Return how many records a shard holds: at least one, and whole batches in large shards."""
    count = min(MOST_RECORDS, max(1, int(shard_mb * 1e6 / record_bytes(tensors))))
    return count if count < LARGE_SHARD else count - count % WHOLE_BATCHES
