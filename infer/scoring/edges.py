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

# Share of the picture's diagonal by which edges may differ and still count as the same, as in the
# Berkeley segmentation benchmark: Martin, Fowlkes and Malik 2004, IEEE TPAMI 26.
TOLERANCE = 0.0075
SIGMA_PX = 1.0
# A drawing of lines has nearly no grey pixels, and few pixels of one of the two colours.
LEAST_PURE, MOST_LINES = 0.9, 0.35

Mask = NDArray[np.bool_]


def edge_agreement(picture: Image.Image, conditioning: Image.Image) -> dict[str, float | None]:
    """Return precision, recall and F1 of a picture's edges against lines.

    The picture's edges come from Canny's detector (1986, IEEE TPAMI 8); the lines are thinned. An
    edge is right if a line is within the tolerance; a line is found if an edge is within it.

    Args:
        picture: RGB.
        conditioning: drawing of lines, as large as the picture.

    Returns:
        `edge_precision`, None without edges; `edge_recall`, None without lines; `edge_f1`.
    """
    edges = canny(np.asarray(picture.convert("L"), np.float64) / 255, sigma=SIGMA_PX)
    return agreement(edges, lines(conditioning))


def agreement(edges: Mask, targets: Mask) -> dict[str, float | None]:
    """Return precision, recall and F1 of edges, with the keys of `edge_agreement`.

    Args:
        edges: edges of the picture, [H, W].
        targets: lines that they should follow, [H, W].
    """
    precision, recall = _share_near(edges, targets), _share_near(targets, edges)
    f1: float | None = 0.0
    if precision and recall:
        f1 = 2 * precision * recall / (precision + recall)
    elif precision is None and recall is None:
        f1 = None
    return {"edge_precision": precision, "edge_recall": recall, "edge_f1": f1}


def _share_near(pixels: Mask, others: Mask) -> float | None:
    """Return the share of pixels that have another one within the tolerance; None of no pixels."""
    if not pixels.any():
        return None
    if not others.any():
        return 0.0
    distance = distance_transform_edt(~others)
    return float(np.mean(distance[pixels] <= TOLERANCE * math.hypot(*pixels.shape)))


def lines(conditioning: Image.Image) -> Mask:
    """Return the lines of a conditioning image, a pixel wide, [H, W]."""
    light = np.asarray(conditioning.convert("L")) >= 128
    # The rarer colour is that of the lines.
    thin: Mask = skeletonize(~light if light.mean() > 0.5 else light)
    return thin


def has_lines(conditioning: Image.Image) -> bool:
    """Tell whether an image is a drawing of lines, as Canny, HED, scribbles and outlines are."""
    values = np.asarray(conditioning.convert("L"))
    light = values >= 128
    pure = np.mean((values < 64) | (values >= 192))
    share = min(light.mean(), 1 - light.mean())
    return bool(pure >= LEAST_PURE and 0 < share <= MOST_LINES)
