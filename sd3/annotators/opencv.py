"""Annotators of lines from OpenCV: Canny's edges, the strength of edges, thin lines.

Soft edges and line art are sums of filters. They are not what the networks of these names draw.

Axes: H x W pixels.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigError

# Share of the pixels that are as strong as white, or stronger.
WHITE_SHARE = 0.01
# Of Marr and Hildreth 1980, Proc. R. Soc. Lond. B 207: the difference of two Gaussians whose
# widths have this ratio is closest to the Laplacian.
RATIO = 1.6

Grey = NDArray[np.float32]


def canny(
    image: Image.Image, low_threshold: float = 100.0, high_threshold: float = 200.0
) -> Image.Image:
    """Return the image's edges, white on black.

    The default thresholds are those of diffusers' documentation.
    """
    edges = _cv2().Canny(np.asarray(image), low_threshold, high_threshold)
    return Image.fromarray(edges).convert("RGB")


def softedge(image: Image.Image, sigma: float = 1.0) -> Image.Image:
    """Return how strong the image's edges are, white where strongest.

    The size of the gradient by Sobel's filter, after a Gaussian blur of `sigma` pixels.
    """
    cv2, smooth = _cv2(), _smooth(image, sigma)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    return _to_white(cv2.magnitude(across, down))


def lineart(image: Image.Image, sigma: float = 1.0) -> Image.Image:
    """Return the image's dark lines of about `sigma` pixels, white on black.

    How much darker a pixel is than its neighbourhood: the difference of two Gaussians.
    """
    darker = _smooth(image, RATIO * sigma) - _smooth(image, sigma)
    return _to_white(np.maximum(darker, 0))


def _cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            "--conditioning-from canny, softedge and lineart need OpenCV: "
            "pip install opencv-python-headless."
        ) from error
    return cv2


def _smooth(image: Image.Image, sigma: float) -> Grey:
    if sigma <= 0:
        raise ValueError("sigma must be above 0")
    grey = np.asarray(image.convert("L"), np.float32)
    smooth: Grey = _cv2().GaussianBlur(grey, (0, 0), sigma)
    return smooth


def _to_white(strength: Grey) -> Image.Image:
    """Return strengths as grey values; the strongest hundredth is white, [H, W]."""
    white = float(np.quantile(strength, 1 - WHITE_SHARE))
    if white <= 0:  # hardly any pixel has some
        white = float(strength.max()) or 1.0
    grey = np.rint(np.clip(strength / white, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
