"""Validation pairs: prompts and conditioning images that training draws, encoded beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor
from torch import Tensor

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.fingerprints.fingerprint import hash_bytes
from precompute.planning.inventory import digests_of
from precompute.planning.layout import arrange, items_of_slots
from precompute.planning.plan import ProductPlan
from sd3 import images
from sd3.annotators.annotator import Annotator
from sd3.buckets import nearest_buckets
from sd3.image_files import BadImage, read_file, read_header
from sd3.inpainting import without_masked
from sd3.pixels import to_uint8


@dataclass(frozen=True)
class ValidationPair:
    """A prompt and its conditioning image, fitted to a bucket.

    Attributes:
        path: the image's file.
        prompt: what is drawn.
        image_hash: of the file, in words that say what becomes of it.
        transparent: whether the file may have transparent pixels.
        bucket: whose shape the image has.
        conditioning_image: [3, H, W], 0 to 255; for inpainting [4, H, W], see `sd3.inpainting`.
        is_photograph: whether an annotator that draws in batches has yet to draw from it.
    """

    path: Path
    prompt: str
    image_hash: str
    transparent: bool
    bucket: int
    conditioning_image: Tensor
    is_photograph: bool = False


def find_pairs(
    config: PrecomputeConfig, shapes: list[tuple[int, int]], annotator: Annotator | None
) -> list[ValidationPair]:
    """Return the validation pairs that the settings name.

    Args:
        config: the settings.
        shapes: width and height of each bucket, in pixels.
        annotator: draws from their images, as from those of the rows; None if these are
            conditioning images.

    Raises:
        ConfigError: an image cannot be used.
    """
    pairs = []
    draws = annotator is not None and not config.validation_image_as_is
    for prompt, path in config.validation_pairs():
        try:
            data = read_file(path)
            bucket, fitted = _fitted(data, config, shapes, annotator if draws else None)
        except BadImage as error:
            raise ConfigError(f"--validation-image {path}: {error}.") from error
        pair = ValidationPair(
            path=path,
            prompt=prompt,
            image_hash=hash_bytes(data) + (" drawn from" if draws else ""),
            transparent=read_header(data).is_transparent,
            bucket=bucket,
            conditioning_image=to_uint8(fitted),
            is_photograph=bool(draws and annotator and annotator.in_batches),
        )
        pairs.append(pair)
    return pairs


def _fitted(
    data: bytes,
    config: PrecomputeConfig,
    shapes: list[tuple[int, int]],
    annotator: Annotator | None,
) -> tuple[int, Image.Image]:
    """Return the bucket of a validation image, and the conditioning image that it is, or gives.

    Raises:
        BadImage: it cannot be used.
    """
    mask = None
    if annotator:
        image = images.decode(data, config.background)
    elif config.inpainting:
        image, mask = images.decode_for_inpainting(data)
    else:
        image = images.decode_conditioning(data, config.background, config.conditioning_scale)
    bucket = int(nearest_buckets(np.array([image.size], np.int32), shapes)[0])
    fitted = control = images.fit(image, shapes[bucket])
    if mask is not None:
        control = images.fit(mask, shapes[bucket])
    elif annotator and annotator.function:
        control = images.annotated(fitted, annotator.function)
    return bucket, without_masked(fitted, control) if config.inpainting else control


def pairs_over(
    pairs: Sequence[ValidationPair], identity: Mapping[str, Any], colour: str
) -> list[ValidationPair]:
    """Return the pairs with the background in the hash of transparent images.

    Unless it is the one that the conditioning's identity stands for, as for rows' images.
    """
    background = list(ImageColor.getrgb(colour))
    if identity["background"] == background:
        return list(pairs)
    return [
        replace(pair, image_hash=f"{pair.image_hash} over {background}")
        if pair.transparent
        else pair
        for pair in pairs
    ]


def plan_validation(
    folder: Path,
    pairs: Sequence[ValidationPair],
    identity: Mapping[str, Any],
    pair_bytes: Sequence[int],
) -> ProductPlan:
    """Return the plan of the validation pairs: one shard for each bucket that has pairs.

    Args:
        folder: of the product.
        pairs: all validation pairs.
        identity: what the records' bytes depend on besides the pairs.
        pair_bytes: size of a record's tensors, by bucket.
    """
    contents = digests_of(f"{pair.image_hash} {pair.prompt}" for pair in pairs)
    buckets = np.array([pair.bucket for pair in pairs], np.int64)
    sizes = [max(1, int((buckets == bucket).sum())) for bucket in range(len(pair_bytes))]
    layout, slots = arrange(contents[:, 0], buckets, sizes)
    return ProductPlan(
        folder, identity, layout, items_of_slots(layout, slots), contents, pair_bytes
    )
