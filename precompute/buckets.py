"""Aspect-ratio buckets: a few shapes of about the same area, so that no image is cropped much.

Shapes are (width, height), in pixels.
"""

import numpy as np
from numpy.typing import NDArray

from precompute.layout import Numbers

STEP_PX = 64
LARGEST_ASPECT = 3.0


def bucket_shapes(resolution_px: int) -> list[tuple[int, int]]:
    """Return the shapes whose sides are multiples of 64 and whose area is nearest resolution².

    One for each width, from tall to wide, none more than three times as long as wide.
    """
    area = resolution_px**2
    shapes = []
    for width in range(STEP_PX, int(resolution_px * LARGEST_ASPECT), STEP_PX):
        height = max(1, round(area / width / STEP_PX)) * STEP_PX
        if 1 / LARGEST_ASPECT <= width / height <= LARGEST_ASPECT:
            shapes.append((width, height))
    return shapes


def nearest_buckets(sizes: NDArray[np.int32], shapes: list[tuple[int, int]]) -> Numbers:
    """Return for each image the bucket whose aspect ratio is nearest its own, in proportion.

    Args:
        sizes: width and height of each image, [N, 2]; 0 where unknown, which gives bucket 0.
        shapes: of the buckets.
    """
    if len(shapes) == 1 or not len(sizes):
        return np.zeros(len(sizes), np.int64)
    logs = np.log([width / height for width, height in shapes])
    wide, high = np.maximum(sizes, 1).astype(np.float64).T
    # Between two neighbours the border is where they are equally far.
    return np.where(
        (sizes > 0).all(axis=1), np.searchsorted((logs[1:] + logs[:-1]) / 2, np.log(wide / high)), 0
    ).astype(np.int64)
