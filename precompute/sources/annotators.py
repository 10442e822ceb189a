"""Annotators draw conditioning images from images: Canny edges, or the user's own function.

An annotator takes the image as it is encoded, resized and cropped, and returns the conditioning
image. Inference calls it with a picture of the size that it draws.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import ConfigError

Annotator = Callable[[Image.Image], Image.Image]
CANNY = "canny"
# The thresholds of diffusers' documentation.
LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200


def find_annotator(name: str) -> tuple[Annotator, list[str]]:
    """Return an annotator, and its identity: its name and a hash of its source.

    Args:
        name: `canny`, or `package.module:function`.

    Raises:
        ConfigError: there is no such function, or a library is missing.
    """
    if name == CANNY:
        return _canny(), [name, f"{LOW_THRESHOLD} {HIGH_THRESHOLD}"]
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ConfigError(
            f"--conditioning-from {name}: expected canny, or package.module:function."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"--conditioning-from {name}: {module_name} cannot be imported "
            f"({type(error).__name__}: {error}); it must lie in this folder or be installed."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"--conditioning-from {name}: {module_name} has no such function.")
    try:
        source = Path(inspect.getfile(module)).read_bytes()
    except (OSError, TypeError) as error:
        raise ConfigError(
            f"--conditioning-from {name}: the source of {module_name} cannot be read, which is "
            "needed to notice changes of it."
        ) from error
    return function, [name, hashlib.sha256(source).hexdigest()]


def _canny() -> Annotator:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            "--conditioning-from canny needs OpenCV: pip install opencv-python-headless."
        ) from error

    def canny(image: Image.Image) -> Image.Image:
        """Return the image's edges, white on black."""
        edges = cv2.Canny(np.asarray(image), LOW_THRESHOLD, HIGH_THRESHOLD)
        return Image.fromarray(edges).convert("RGB")

    return canny
