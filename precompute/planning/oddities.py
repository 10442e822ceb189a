"""Odd pictures, as far as headers tell, and captions: what becomes of them is said."""

from collections.abc import Callable

import numpy as np

from precompute.planning.context import Context
from precompute.planning.inventory import Inventory, digests_of
from precompute.planning.layout import Numbers
from precompute.sources.counted import MOST_NAMED, Counted
from precompute.sources.source import Kind
from sd3.buckets import nearest_buckets

LARGEST_ENLARGEMENT = 2
EMPTY = digests_of(iter([""]))


def describe_oddities(context: Context) -> list[str]:
    """Return a line for each kind of odd rows: how many there are, and the first of them."""

    def file_name(kind: Kind) -> Callable[[int], str]:
        return lambda row: context.file_name(row, kind)

    def name_and_size(row: int) -> str:
        width, height = context.inventory.sizes[row]
        return f"{context.file_name(row, 'image')} ({width} x {height} px)"

    def name_in_source(index: int) -> str:
        (row,) = context.source.rows([index])
        return row.image

    is_asked_for = context.config.caption is not None
    crops, larger = "", ""
    if context.config.views > 1:
        crops, larger = ", or crops of them,", ", --crop-scale with a larger LOW cuts larger ones"
    kinds = (
        (
            Counted[int]() if is_asked_for else _used(context, empty_captions(context.inventory)),
            "captions are empty, and train the ControlNet without a prompt",
            file_name("image"),
        ),
        (
            context.inventory.too_small,
            f"images are smaller than --min-image-px {context.config.min_image_px}, and their rows "
            "are left out",
            name_in_source,
        ),
        (
            _enlarged(context),
            f"images{crops} are enlarged more than twofold; --min-image-px N leaves smaller ones "
            f"out{larger}",
            name_and_size,
        ),
        (
            _used(context, np.flatnonzero(context.inventory.has_profile)),
            "images have a colour profile other than sRGB, and are converted to sRGB",
            file_name("image"),
        ),
        (
            context.inventory.rounded,
            "conditioning images have rounded sides, and are stretched back to their images' shape",
            file_name("conditioning_image"),
        ),
        (
            _used(context, np.flatnonzero(context.inventory.other_shape)),
            "conditioning images have another shape than their images; --conditioning-fit "
            f"{context.config.conditioning_fit} is done to them",
            file_name("conditioning_image"),
        ),
    )
    return [
        f"{found.count} {what}: {found.named(name)}" for found, what, name in kinds if found.count
    ]


def empty_captions(inventory: Inventory) -> Numbers:
    """Return the rows whose caption, or one of whose captions, is empty: [R], ascending."""
    places = np.flatnonzero((inventory.captions == EMPTY).all(axis=1))
    return np.unique(np.searchsorted(inventory.caption_ends, places, side="right") - 1)


def _enlarged(context: Context) -> Counted[int]:
    """Return the rows whose image, or its smallest crop, is smaller than half of what it is resized
    to, either way.
    """
    sizes, shapes = context.inventory.sizes, context.specs.latent_settings.shapes
    wanted = np.array(shapes)[nearest_buckets(sizes, shapes)]
    smallest = sizes * (context.config.random_crops.least if context.config.views > 1 else 1)
    small = (wanted > LARGEST_ENLARGEMENT * smallest).any(axis=1) & (sizes > 0).all(axis=1)
    return _used(context, np.flatnonzero(small))


def _used(context: Context, rows: Numbers) -> Counted[int]:
    """Return those of the rows that are not bad; they may be all ten million."""
    bad = np.fromiter(context.bad_rows.rows, np.int64)
    used = np.setdiff1d(rows, bad, assume_unique=True)
    return Counted(len(used), used[:MOST_NAMED].tolist())
