"""The samples that scoring draws: a source's rows, their images in the pictures' size."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image

from common.errors import ConfigError
from infer.config import ScoreConfig
from infer.convention import Convention
from infer.photographs import Photograph, Redrawing, draw_controls
from infer.scoring.measures import Sample
from precompute.sources.source import Row, Source
from sd3 import images
from sd3.inpainting import without_masked


def read_samples(
    config: ScoreConfig,
    source: Source,
    conventions: Sequence[Convention],
    redrawing: Redrawing | None,
) -> Iterator[Sample]:
    """Yield the source's first rows.

    Args:
        config: settings of the run.
        source: with conditioning images, unless these are drawn from its images.
        conventions: of the ControlNets.
        redrawing: what draws their controls; None if nothing says so.

    Raises:
        ConfigError: an image cannot be used, is another to one of the ControlNets, or nothing can
            be drawn from it.
        RunError: the device's memory is full.
    """
    rows = source.rows(range(min(config.num_samples, len(source))))
    if config.from_photo:
        assert redrawing is not None
        yield from _from_photographs(source, rows, conventions[0], redrawing)
        return
    convention = conventions[0]
    name = redrawing.annotator.name if redrawing else None
    for number, row in enumerate(rows):
        with _named(row):
            data = source.read(number, "conditioning_image")
            conditioning = _decode_for_all(data, conventions)
            image = _read_image(source, number, convention.background)
            leading = image or conditioning  # as in training, where controls follow images
            size = convention.picture_size(leading)
            control = images.fit(
                conditioning, size, like=leading.size, other_shape=config.conditioning_fit
            )
            target = None if image is None else images.fit(image, size)
            if convention.inpainting:
                if target is None:
                    raise ValueError("it has no image, and inpainting draws a part of one anew")
                control = without_masked(target, control)
            sample = Sample(number, _first_caption(row), control, target, name)
        yield sample


def _from_photographs(
    source: Source, rows: Iterator[Row], convention: Convention, redrawing: Redrawing
) -> Iterator[Sample]:
    """Yield rows whose controls are drawn from their images."""
    waiting: deque[tuple[int, str, Image.Image]] = deque()

    def photographs() -> Iterator[Photograph]:
        for number, row in enumerate(rows):
            with _named(row):
                image = images.decode(source.read(number, "image"), convention.background)
                size = convention.picture_size(image)
                waiting.append((number, _first_caption(row), images.fit(image, size)))
            yield Photograph(f"--source, {row.where}", image, size)

    for control in draw_controls(redrawing.open(), photographs()):
        number, caption, target = waiting.popleft()
        if convention.inpainting:
            control = without_masked(target, control)
        yield Sample(number, caption, control, target, redrawing.annotator.name)


@contextmanager
def _named(row: Row) -> Iterator[None]:
    """Name the row in errors."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"--source, {row.where}: {error}.") from error


def _decode_for_all(data: bytes, conventions: Sequence[Convention]) -> Image.Image:
    """Return a conditioning image as all ControlNets take it.

    Raises:
        ValueError: it cannot be decoded, or they take it over other backgrounds or at other scales.
    """
    ways = dict.fromkeys((each.background, each.scale) for each in conventions)
    first, *others = (images.decode_conditioning(data, *way) for way in ways)
    if any(other.tobytes() != first.tobytes() for other in others):
        listed = " and ".join(f"{background}, {scale}" for background, scale in ways)
        raise ValueError(
            "its conditioning image is another one over each ControlNet's background and at its "
            f"scale ({listed}); score them one by one"
        )
    return first


def _first_caption(row: Row) -> str:
    """Return a row's caption, of several the first.

    Raises:
        ValueError: it is no text.
    """
    caption = next(iter(row.prompts), None)
    if not isinstance(caption, str):
        raise ValueError(f"its caption is not text but {type(caption).__name__}")
    return caption


def _read_image(source: Source, number: int, background: str) -> Image.Image | None:
    """Return a row's image, or None where the source has none; `Measure.check` reports it."""
    try:
        data = source.read(number, "image")
    except OSError:
        return None
    return images.decode(data, background)
