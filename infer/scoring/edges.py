"""How well the edges of a picture agree with a conditioning image of lines.

Axes: H x W pixels.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from skimage.feature import canny
from skimage.morphology import skeletonize

# Of the picture's diagonal; how far apart edges may be and still count as the same, as in the
# Berkeley segmentation benchmark: Martin, Fowlkes and Malik 2004, IEEE TPAMI 26.
TOLERANCE = 0.0075
SIGMA_PX = 1.0
# Light lines on black, or dark ones on white: nearly no pixel is in between, and lines are few.
LEAST_PURE, MOST_LINES = 0.9, 0.35

Mask = NDArray[np.bool_]


def edge_agreement(picture: Image.Image, conditioning: Image.Image) -> dict[str, float | None]:
    """Return precision, recall and F1 of a picture's edges against lines.

    A picture's edges are those of Canny's detector (1986, IEEE TPAMI 8); lines are thinned. An edge
    is right if a line is near enough, a line is found if an edge is.

    Args:
        picture: RGB.
        conditioning: lines, as large as the picture.

    Returns:
        `edge_precision`, None without edges; `edge_recall`, None without lines; `edge_f1`.
    """
    edges = canny(np.asarray(picture.convert("L"), np.float64) / 255, sigma=SIGMA_PX)
    return agreement(edges, lines(conditioning))


def agreement(edges: Mask, wanted: Mask) -> dict[str, float | None]:
    """Return precision, recall and F1 of edges, [H, W] both; see `edge_agreement`."""
    precision, recall = _near(edges, wanted), _near(wanted, edges)
    f1: float | None = 0.0
    if precision and recall:
        f1 = 2 * precision * recall / (precision + recall)
    elif precision is None and recall is None:
        f1 = None
    return {"edge_precision": precision, "edge_recall": recall, "edge_f1": f1}


def _near(these: Mask, those: Mask) -> float | None:
    """Return the share of these pixels that have one of those within the tolerance."""
    if not these.any():
        return None
    if not those.any():
        return 0.0
    distance = distance_transform_edt(~those)
    return float(np.mean(distance[these] <= TOLERANCE * math.hypot(*these.shape)))


def lines(conditioning: Image.Image) -> Mask:
    """Return the lines of a conditioning image, a pixel wide, [H, W]."""
    light = np.asarray(conditioning.convert("L")) >= 128
    # What there is less of is the lines.
    thin: Mask = skeletonize(~light if light.mean() > 0.5 else light)
    return thin


def has_lines(conditioning: Image.Image) -> bool:
    """Tell whether a conditioning image is a drawing of lines: Canny, HED, scribbles, outlines."""
    values = np.asarray(conditioning.convert("L"))
    light = values >= 128
    pure = np.mean((values < 64) | (values >= 192))
    share = min(light.mean(), 1 - light.mean())
    return bool(pure >= LEAST_PURE and 0 < share <= MOST_LINES)
