"""Controls drawn from photographs, by the code that drew those of the ControlNet's training."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import click
from PIL import Image

from common.device import pick_device
from common.errors import ConfigError
from infer.config import PipelineConfig
from infer.convention import Convention
from precompute.fingerprints.annotator_spec import annotator_spec
from precompute.fingerprints.digest_cache import DigestCache
from sd3.annotators.annotator import Annotator
from sd3.annotators.arguments import parse_arguments
from sd3.annotators.drawing import Drawing
from sd3.annotators.registry import find_annotator
from sd3.image_files import BadImage
from sd3.images import fit


@dataclass(frozen=True)
class Redrawing:
    """What draws a ControlNet's controls from pictures.

    Attributes:
        annotator: as in training, unless the settings name another.
        digest: of all that its drawings depend on.
        device: where it draws.
    """

    annotator: Annotator
    digest: str
    device: str

    def open(self) -> Drawing:
        """Return the annotator at work, its network on the device."""
        return Drawing(self.annotator, self.device)


def find_redrawing(config: PipelineConfig, name: str, convention: Convention) -> Redrawing:
    """Return what draws a ControlNet's controls: as the settings say, or else its configuration.

    Args:
        config: settings of the run.
        name: folder or hub id of the ControlNet, as the user gave it.
        convention: the ControlNet's.

    Raises:
        ConfigError: neither says what draws them, or it is not to be had.
    """
    saved = convention.annotator
    given = parse_arguments(config.conditioning_args)
    if config.conditioning_from is not None:
        annotator = find_annotator(config.conditioning_from, given, cache_dir=config.cache_dir)
    elif saved is not None:
        try:
            arguments = saved.arguments | given
            annotator = find_annotator(saved.name, arguments, cache_dir=config.cache_dir)
        except ConfigError as error:
            raise ConfigError(
                f"--controlnet {name}: its controls were drawn by {saved.name}, and cannot be "
                f"here: {error} Of a path its last part is noted: if it lies elsewhere, say where "
                "by --conditioning-from and --conditioning-args."
            ) from error
    elif convention.mixed:
        raise ConfigError(
            f"--controlnet {name}: was trained on several controls: {', '.join(convention.mixed)}. "
            "Choose what draws one from photographs by --conditioning-from and --conditioning-args."
        )
    else:
        raise ConfigError(
            f"--controlnet {name}: its configuration does not say what draws its controls from "
            "photographs; give --conditioning-from, for instance canny."
        )
    spec = annotator_spec(annotator, DigestCache.in_memory())
    if saved is not None and spec.digest != saved.digest:
        click.echo(
            f"{name}: {annotator.name} does not draw as in its training: other code, arguments or "
            "weights.",
            err=True,
        )
    return Redrawing(annotator, spec.digest, str(pick_device(config.device)))


class Photograph(NamedTuple):
    """A picture that a control is drawn from: RGB, of any size.

    Attributes:
        name: for errors.
        image: its pixels.
        size: width and height of the picture that is to follow the control.
    """

    name: str
    image: Image.Image
    size: tuple[int, int]


def draw_controls(drawing: Drawing, photographs: Iterable[Photograph]) -> Iterator[Image.Image]:
    """Yield the controls of photographs in order, each fitted as in training.

    Photographs are taken as they are needed, a batch at a time.

    Raises:
        ConfigError: from one nothing can be drawn.
        RunError: the device's memory is full.
    """
    names: deque[str] = deque()

    def fitted() -> Iterator[Image.Image]:
        for name, image, size in photographs:
            names.append(name)
            try:
                yield fit(image, size)
            except BadImage as error:
                raise ConfigError(f"{name}: {error}.") from error

    for drawn in drawing.draw_all(fitted()):
        name = names.popleft()
        if isinstance(drawn, BadImage):
            raise ConfigError(f"{name}: {drawn}.")
        yield drawn
