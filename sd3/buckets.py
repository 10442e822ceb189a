"""Aspect-ratio buckets: a few shapes of about equal area, so that no image is cropped much.

Shapes are (width, height), in pixels.
"""

import numpy as np
from numpy.typing import NDArray

STEP_PX = 64
LARGEST_ASPECT = 4.0


def bucket_shapes(resolution_px: int) -> list[tuple[int, int]]:
    """Return the shapes whose sides are multiples of 64 and whose area is nearest resolution².

    There is one shape for each shorter side, upright and lying, ordered from tall to wide. The
    longer side is at most four times the shorter one.
    """
    shapes = set()
    for short in range(STEP_PX, resolution_px + 1, STEP_PX):
        long = max(short, round(resolution_px**2 / short / STEP_PX) * STEP_PX)
        if long <= LARGEST_ASPECT * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes, key=lambda shape: shape[0] / shape[1])


def nearest_buckets(sizes: NDArray[np.int32], shapes: list[tuple[int, int]]) -> NDArray[np.int64]:
    """Return for each image the bucket with the nearest aspect ratio, compared by logarithm.

    Args:
        sizes: width and height of each image, [N, 2]; 0 if unknown, which gives bucket 0.
        shapes: width and height of each bucket, in pixels.
    """
    if len(shapes) == 1 or not len(sizes):
        return np.zeros(len(sizes), np.int64)
    logs = np.log([width / height for width, height in shapes])
    wide, high = np.maximum(sizes, 1).astype(np.float64).T
    # The border between two neighbours is at equal distance from both.
    return np.where(
        (sizes > 0).all(axis=1), np.searchsorted((logs[1:] + logs[:-1]) / 2, np.log(wide / high)), 0
    ).astype(np.int64)
