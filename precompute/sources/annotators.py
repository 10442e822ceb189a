"""Annotators draw conditioning images from images: Canny edges, or the user's own function.

An annotator takes the image as it is encoded, resized and cropped, and returns the conditioning
image. Inference calls it with a picture of the size that it draws.
"""

import ast
import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.errors import ConfigError
from precompute.sources.annotator_sources import named_files, own_sources

Annotator = Callable[[Image.Image], Image.Image]
CANNY = "canny"
# The thresholds of diffusers' documentation.
LOW_THRESHOLD, HIGH_THRESHOLD = 100, 200


class FoundAnnotator(NamedTuple):
    """An annotator, and what its drawings depend on.

    Attributes:
        function: the annotator.
        name: of the function within its module, or of an annotator of ours.
        sources: hashes of its module's source, then of those of the modules that it imports.
        files: that its sources name, its weights for instance.
        former: how former versions of this program identified it.
    """

    function: Annotator
    name: str
    sources: list[str]
    files: list[Path]
    former: list[str]


def find_annotator(name: str) -> FoundAnnotator:
    """Return an annotator.

    Args:
        name: `canny`, or `package.module:function`.

    Raises:
        ConfigError: there is no such function, or a library is missing.
    """
    if name == CANNY:
        thresholds = f"{LOW_THRESHOLD} {HIGH_THRESHOLD}"
        return FoundAnnotator(_canny(), name, [thresholds], [], [name, thresholds])
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
        source = Path(inspect.getfile(module)).resolve()
        trees = {source: ast.parse(source.read_bytes())} | own_sources(module_name)
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in trees]
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"--conditioning-from {name}: the source of {module_name} cannot be read, which is "
            "needed to notice changes of it."
        ) from error
    qualified = str(getattr(function, "__qualname__", ""))
    is_its_name = getattr(module, qualified, None) is function
    return FoundAnnotator(
        function,
        qualified if is_its_name else function_name,
        [hashes[0], *sorted(hashes[1:])],
        named_files(trees),
        [name, hashes[0]],
    )


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
