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
        self.device = device
        self._draw = _load(annotator, device)

    def draw(self, images: Sequence[Image.Image]) -> list[Image.Image | BadImage]:
        """Return the conditioning images of fitted images, or why there is none.

        Raises:
            RunError: the device's memory is full.
        """
        if self._draw is None:
            return [self._draw_one(image) for image in images]
        drawn = self._draw_batch(self._draw, images)
        if drawn is None:
            # After the handler of its error, whose traceback holds the tensors of the attempt.
            _give_back_memory()
            return [one for image in images for one in self.draw([image])]
        return drawn

    def draw_all(self, images: Iterable[Image.Image]) -> Iterator[Image.Image | BadImage]:
        """Yield what `draw` returns for any number of images, of any sizes, in order.

        They are taken as they are needed; neighbours of one size make a batch.

        Raises:
            RunError: the device's memory is full.
        """
        for _, same_size in groupby(images, key=lambda image: image.size):
            while batch := list(islice(same_size, BATCH)):
                yield from self.draw(batch)

    def _draw_batch(
        self, draw: DrawBatch, images: Sequence[Image.Image]
    ) -> list[Image.Image | BadImage] | None:
        """Return what is drawn from a batch; None if several together fail.

        Raises:
            RunError: the device's memory is full with a single image.
        """
        try:
            drawn = list(draw(images))
            if len(drawn) != len(images):
                raise ValueError(f"{len(drawn)} pictures come back for {len(images)}")
        except Exception as error:  # whatever the user's own code raises
            if len(images) > 1:
                return None
            _refuse_full_memory(error, self.annotator, self.device)
            return [not_drawn(error)]
        return [_as_drawn(one, image.size) for one, image in zip(drawn, images, strict=True)]

    def _draw_one(self, image: Image.Image) -> Image.Image | BadImage:
        assert self.annotator.function is not None
        try:
            return annotated(image, self.annotator.function)
        except BadImage as error:
            return error


def _load(annotator: Annotator, device: str) -> DrawBatch | None:
    if annotator.load is None:
        return None
    try:
        return annotator.load(device)
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's own code, or a library, raises
        _refuse_full_memory(error, annotator, device)
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--conditioning-from {annotator.name}: cannot be loaded "
            f"({type(error).__name__}: {reason})."
        ) from error


def _give_back_memory() -> None:
    import torch

    torch.cuda.empty_cache()


def _refuse_full_memory(error: Exception, annotator: Annotator, device: str) -> None:
    """Raise a RunError in an error's place if it says that memory is full."""
    import torch

    from common.memory.exhausted import device_remedies, full_memory_line, is_out_of_memory

    if is_out_of_memory(error):
        remedies = device_remedies(torch.device(device))
        raise RunError(
            full_memory_line(f"the annotator {annotator.name}", error, remedies)
        ) from error


def _as_drawn(drawn: object, size_px: tuple[int, int]) -> Image.Image | BadImage:
    try:
        return as_drawn(drawn, size_px)
    except BadImage as error:
        return error
