"""The pass of an annotator that draws batches on the device, before any encoder is loaded.

What it draws waits on disk for the VAE; see `drawn_controls`.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from PIL import Image

from common.device import use_device
from common.errors import ConfigError
from common.interruption import StopCheck
from common.prefetch import prefetch
from common.progress import Progress
from precompute.encoding.drawn_controls import encode_png, is_drawn, write_drawn
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.load_image import SourceImages
from precompute.encoding.shard_build import ShardBuild, prepare_build
from precompute.planning.context import Context
from precompute.planning.validation_pairs import ValidationPair
from sd3.annotators.drawing import BATCH, Drawing
from sd3.image_files import BadImage
from sd3.pixels import to_image, to_uint8

Loaded = tuple[int, Image.Image | BadImage]


def draw_controls(context: Context, check: StopCheck, clock: EncoderClock) -> Context:
    """Draw what the missing shards of conditioning latents and of validation pairs need.

    Args:
        context: of the run.
        check: called between shards; may end the run.
        clock: measures the time spent drawing.

    Returns:
        The context, with the conditioning images that were drawn for the validation pairs.

    Raises:
        ConfigError: from a validation image nothing can be drawn.
        RunError: the device's memory is full.
        OSError: the disk is full; finished shards are kept.
    """
    annotator = context.annotator
    if annotator is None or not annotator.in_batches:
        return context
    counts = shards_to_draw(context)
    wants_pairs = bool(context.shards_to_build(context.products.validation))
    if not counts and not (wants_pairs and any(pair.is_photograph for pair in context.pairs)):
        return context
    context.print(f"  {annotator.name}: draws conditioning images before the encoders are loaded")
    drawing = Drawing(annotator, str(context.device))
    if wants_pairs:
        context = replace(context, pairs=_drawn_pairs(context, drawing))
    source_images = SourceImages(context)
    with Progress(sum(counts.values()), "image", "drawing", quiet=context.quiet) as bar:
        for shard in counts:
            build, positions = _to_draw(context, shard)
            drawn = _draw_shard(context, source_images, build, positions, drawing, clock)
            with contextlib.closing(drawn) as batches:
                write_drawn(build, _advance(batches, bar))
            check()
    return context


def shards_to_draw(context: Context) -> dict[int, int]:
    """Return how many images are to be drawn for each shard that is not drawn yet."""
    if context.annotator is None or not context.annotator.in_batches:
        return {}
    # Counts, and no builds: together these may fill the memory.
    return {
        shard: len(positions)
        for shard in context.shards_to_build(context.products.conditioning)
        for build, positions in [_to_draw(context, shard)]
        if not is_drawn(build, positions)
    }


def pictures_to_draw(context: Context, shard: int, count: int) -> list[Image.Image]:
    """Return the first pictures that a shard's images are drawn from, at most `count`."""
    build, positions = _to_draw(context, shard)
    load = _loader(context, SourceImages(context), build)
    loaded = (picture for _, picture in map(load, positions))
    usable = (picture for picture in loaded if isinstance(picture, Image.Image))
    return list(itertools.islice(usable, count))


def _to_draw(context: Context, shard: int) -> tuple[ShardBuild, list[int]]:
    """Return a shard of conditioning latents, and the positions of what is to be drawn in it."""
    product, inventory = context.products.conditioning, context.inventory
    build = prepare_build(product, shard, lambda item: context.metadata(product, item))
    positions = [
        position
        for position in sorted(build.to_encode)
        if context.row_of(int(build.plan.items[position])) not in inventory.faults
    ]
    return build, positions


def _advance(
    batches: Iterator[list[tuple[int, bool, bytes]]], bar: Progress
) -> Iterator[tuple[int, bool, bytes]]:
    for batch in batches:
        yield from batch
        bar.update(len(batch))


def _draw_shard(
    context: Context,
    source_images: SourceImages,
    build: ShardBuild,
    positions: Sequence[int],
    drawing: Drawing,
    clock: EncoderClock,
) -> Generator[list[tuple[int, bool, bytes]], None, None]:
    """Yield the drawn images of a shard in batches; loaded ahead and compressed in threads."""
    load = _loader(context, source_images, build)
    num_threads = context.config.dataloader_num_workers
    set_up = partial(use_device, context.device)
    with (
        ThreadPoolExecutor(num_threads, "load", set_up) as pool,
        contextlib.closing(prefetch(pool, load, positions, 2 * BATCH)) as loaded,
    ):
        while batch := list(itertools.islice(loaded, BATCH)):
            images = [image for _, image in batch if isinstance(image, Image.Image)]
            with clock.measure(0):
                drawn = iter(drawing.draw(images) if images else [])
            results = [
                next(drawn) if isinstance(image, Image.Image) else image for _, image in batch
            ]
            pngs = pool.map(encode_png, results)
            yield [
                (position, isinstance(result, Image.Image), png)
                for (position, _), result, png in zip(batch, results, pngs, strict=True)
            ]


def _loader(
    context: Context, source_images: SourceImages, build: ShardBuild
) -> Callable[[int], Loaded]:
    """Return what loads the picture of a position of a shard, or the reason why it cannot."""
    size_px = context.specs.latent_settings.shapes[build.plan.bucket]

    def load(position: int) -> Loaded:
        try:
            item = int(build.plan.items[position])
            return position, source_images.load(item, size_px, "image")
        except BadImage as error:
            return position, error

    return load


def _drawn_pairs(context: Context, drawing: Drawing) -> list[ValidationPair]:
    """Return the validation pairs with what is drawn from their photographs.

    Raises:
        ConfigError: from one nothing can be drawn.
    """
    photographs = (pair for pair in context.pairs if pair.is_photograph)
    all_drawn = drawing.draw_all(to_image(pair.conditioning_image) for pair in photographs)
    pairs = []
    for pair in context.pairs:
        if pair.is_photograph:
            drawn = next(all_drawn)
            if isinstance(drawn, BadImage):
                raise ConfigError(f"--validation-image {pair.path}: {drawn}.")
            pair = replace(pair, conditioning_image=to_uint8(drawn), is_photograph=False)
        pairs.append(pair)
    return pairs
