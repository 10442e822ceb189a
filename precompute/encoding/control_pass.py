"""The pass of an annotator that draws batches on the device, before any encoder is loaded.

What it draws waits on disk for the VAE; see `drawn_controls`.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from PIL import Image

from common.device import use_device
from common.errors import ConfigError
from common.interruption import StopCheck
from common.prefetch import prefetch
from common.progress import Progress
from precompute.encoding.drawn_controls import (
    DrawnControl,
    encode_drawn,
    is_drawn,
    write_drawn,
)
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.load_image import SourceImages
from precompute.encoding.shard_build import ShardBuild, prepare_build
from precompute.planning.context import Context
from precompute.planning.validation_pairs import ValidationPair
from sd3.annotators.drawing import BATCH, Drawing
from sd3.image_files import BadImage
from sd3.pixels import to_image, to_uint8


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
    with Progress(sum(counts.values()), "image", "drawing", quiet=context.quiet) as bar:
        drawer = _ShardDrawer(context, drawing, clock, bar.update)
        for shard in counts:
            build, positions = _to_draw(context, shard)
            with contextlib.closing(drawer.draw(build, positions)) as drawn:
                write_drawn(build, drawn)
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
    source_images = SourceImages(context)
    loaded = (_load(source_images, build, position) for position in positions)
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


def _load(source_images: SourceImages, build: ShardBuild, position: int) -> Image.Image | BadImage:
    """Return the picture that a shard's image is drawn from, or why it cannot be used."""
    size_px = source_images.context.specs.latent_settings.shapes[build.plan.bucket]
    try:
        return source_images.load(int(build.plan.items[position]), size_px, "image")
    except BadImage as error:
        return error


class _ShardDrawer:
    """Draws the images of one shard after the other.

    Args:
        context: of the run.
        drawing: the annotator at work.
        clock: measures the time spent drawing.
        advance: is told how many images were drawn.
    """

    def __init__(
        self,
        context: Context,
        drawing: Drawing,
        clock: EncoderClock,
        advance: Callable[[int], object],
    ) -> None:
        self.drawing = drawing
        self.clock = clock
        self.advance = advance
        self.source_images = SourceImages(context)
        self.num_threads = context.config.num_loaders
        self.set_up_thread = partial(use_device, context.device)

    def draw(
        self, build: ShardBuild, positions: Sequence[int]
    ) -> Generator[DrawnControl, None, None]:
        """Yield what is drawn for positions of a shard; loaded ahead and compressed in threads."""
        load = partial(_load, self.source_images, build)
        with (
            ThreadPoolExecutor(self.num_threads, "load", self.set_up_thread) as pool,
            contextlib.closing(prefetch(pool, load, positions, 2 * BATCH)) as loaded,
        ):
            for start in range(0, len(positions), BATCH):
                batch = positions[start : start + BATCH]
                results = self._draw_batch(list(itertools.islice(loaded, len(batch))))
                yield from pool.map(encode_drawn, batch, results)
                self.advance(len(batch))

    def _draw_batch(self, batch: Sequence[Image.Image | BadImage]) -> list[Image.Image | BadImage]:
        """Return what is drawn from each picture; a reason stays what it is."""
        pictures = [picture for picture in batch if isinstance(picture, Image.Image)]
        with self.clock.measure(0):
            drawn = iter(self.drawing.draw(pictures) if pictures else [])
        return [one if isinstance(one, BadImage) else next(drawn) for one in batch]


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
