"""The annotators by name: ours, those of transformers and of controlnet-aux, and the user's own.

An annotator takes the image as it is encoded, resized and cropped, and returns the conditioning
image. Inference calls it with a picture of the size that it draws.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import ConfigError
from sd3.annotators import degraded, opencv
from sd3.annotators.annotator import Annotator
from sd3.annotators.arguments import FLAG, arguments_text, bind_arguments, parse_arguments
from sd3.annotators.depth import DEPTH, find_depth
from sd3.annotators.detectors import find_detector
from sd3.annotators.own import find_own

CANNY = "canny"
FUNCTIONS: dict[str, Callable[..., Image.Image]] = {
    CANNY: opencv.canny,
    "softedge": opencv.softedge,
    "lineart": opencv.lineart,
    "blur": degraded.blur,
    "grey": degraded.grey,
    "superres": degraded.superres,
    "jpeg": degraded.jpeg,
    "mask": degraded.mask,
    "strokes": degraded.strokes,
}
NAMES = (*FUNCTIONS, DEPTH)
TRIAL_SIDE_PX = 32


def find_annotator(
    name: str, arguments: Sequence[str] | Mapping[str, Any] = (), *, cache_dir: Path | None = None
) -> Annotator:
    """Return an annotator.

    Args:
        name: one of `NAMES`, `package.module:name`, `path/to/file.py:name`, or a name of
            controlnet-aux.
        arguments: as `key=value` texts, or by name.
        cache_dir: folder for downloaded models; None for the hub's default.

    Raises:
        ConfigError: there is no such annotator, it takes other arguments, or a library, a model or
            a source is missing.
    """
    given = arguments if isinstance(arguments, Mapping) else parse_arguments(arguments)
    if name in FUNCTIONS:
        return _function(name, given)
    if name == DEPTH:
        return find_depth(given, cache_dir)
    if ":" in name:
        return find_own(name, given)
    return find_detector(name, given, NAMES)


def _function(name: str, given: Mapping[str, Any]) -> Annotator:
    arguments = bind_arguments(name, FUNCTIONS[name], given)
    function = partial(FUNCTIONS[name], **arguments)
    try:
        function(Image.new("RGB", (TRIAL_SIDE_PX, TRIAL_SIDE_PX), "grey"))
    except ConfigError:
        raise
    except Exception as error:  # of Pillow and OpenCV, on a value that they do not take
        given_as = ", ".join(f"{key}={value}" for key, value in given.items())
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{FLAG} {given_as}: {name} fails ({reason}).") from error
    counted = arguments_text(arguments)
    if name == CANNY:  # as former versions wrote it
        counted = "{low_threshold:g} {high_threshold:g}".format(**arguments)
    identity = [name, counted]
    return Annotator(name, arguments, identity, function, former=identity)
