"""Drawing conditioning images, one at a time or in batches; training and inference call this."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

from PIL import Image

from common.errors import ConfigError, RunError
from sd3.annotators.annotator import Annotator, DrawBatch
from sd3.image_files import BadImage
from sd3.images import annotated, as_drawn, not_drawn

# Pictures that are handed to an annotator at a time.
BATCH = 8


class Drawing:
    """An annotator at work: with its network on the device, if it has one.

    Args:
        annotator: the annotator.
        device: where it draws, e.g. `cuda:0`.

    Raises:
        ConfigError: its network cannot be loaded.
        RunError: the device's memory is full.
    """

    def __init__(self, annotator: Annotator, device: str) -> None:
        self.annotator = annotator
        self._draw = _load(annotator, device)

    def draw(self, images: Sequence[Image.Image]) -> list[Image.Image | BadImage]:
        """Return the conditioning images of fitted images, or why there is none.

        Raises:
            RunError: the device's memory is full.
        """
        if self._draw is not None:
            return draw_batch(self._draw, images)
        return [self._draw_one(image) for image in images]

    def draw_all(self, images: Iterable[Image.Image]) -> Iterator[Image.Image | BadImage]:
        """Yield what `draw` returns for any number of images, of any sizes, in order.

        They are taken as they are needed; neighbours of one size make a batch.

        Raises:
            RunError: the device's memory is full.
        """
        for _, same_size in groupby(images, key=lambda image: image.size):
            while batch := list(islice(same_size, BATCH)):
                yield from self.draw(batch)

    def _draw_one(self, image: Image.Image) -> Image.Image | BadImage:
        assert self.annotator.function is not None
        try:
            return annotated(image, self.annotator.function)
        except BadImage as error:
            return error


def _load(annotator: Annotator, device: str) -> DrawBatch | None:
    import torch

    if annotator.load is None:
        return None
    try:
        return annotator.load(device)
    except ConfigError:
        raise
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error) from error
    except Exception as error:  # whatever the user's own code, or a library, raises
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--conditioning-from {annotator.name}: cannot be loaded "
            f"({type(error).__name__}: {reason})."
        ) from error


def _out_of_memory(error: Exception) -> RunError:
    return RunError(
        f"the annotator: the device's memory is full ({str(error).splitlines()[0]}); "
        "try another --device, or a smaller model"
    )


def draw_batch(draw: DrawBatch, images: Sequence[Image.Image]) -> list[Image.Image | BadImage]:
    """Return what is drawn from a batch; if that fails, what is drawn from each alone.

    Raises:
        RunError: the device's memory is full.
    """
    import torch

    try:
        drawn = list(draw(images))
        if len(drawn) != len(images):
            raise ValueError(f"{len(drawn)} pictures come back for {len(images)}")
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error) from error
    except Exception as error:  # whatever the user's own code raises
        if len(images) == 1:
            return [not_drawn(error)]
        return [one for image in images for one in draw_batch(draw, [image])]
    return [_as_drawn(one, image.size) for one, image in zip(drawn, images, strict=True)]


def _as_drawn(drawn: object, size_px: tuple[int, int]) -> Image.Image | BadImage:
    try:
        return as_drawn(drawn, size_px)
    except BadImage as error:
        return error
