"""Circles as training the base wants them: masks and outlines once, colours anew at each draw.

Axes: B pictures, 3 colours, H x W pixels.
"""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.circles import Circle, draw_disc, draw_outline, random_circles
from demo.colors import COLORS, is_held_out
from sd3.images import fit

BASE_PX = 128
NAMES = list(COLORS)
PALETTE = torch.tensor([COLORS[name] for name in NAMES]) / 127.5 - 1
# Pairs of colours, by index, that the base is trained on and tested on.
TRAINED_PAIRS, HELD_OUT_PAIRS = (
    torch.tensor(
        [
            (one, other)
            for one, color in enumerate(NAMES)
            for other, background in enumerate(NAMES)
            if COLORS[color] != COLORS[background] and is_held_out(color, background) == held_out
        ]
    )
    for held_out in (False, True)
)


def caption(pair: Tensor) -> str:
    """Return the caption of a pair of colour indices."""
    color, background = pair.tolist()
    return Circle(0, 0, 0, NAMES[color], NAMES[background]).prompt


def load_shapes(path: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (masks, outlines) of random circles, [count, H, W], 0 to 255; drawn once, then kept.

    They go through the very drawing, resizing and cropping that a data set goes through.
    """
    if not path.is_file():
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(_draw, random_circles(count, seed), chunksize=64))
        masks, outlines = (
            torch.from_numpy(np.stack(images)) for images in zip(*drawn, strict=True)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"masks": masks, "outlines": outlines}, path)
    shapes = load_file(path)
    return shapes["masks"], shapes["outlines"]


def paint_discs(masks: Tensor, colors: Tensor) -> Tensor:
    """Return pictures [B, 3, H, W] in -1 to 1.

    Args:
        masks: [B, H, W], 0 to 255.
        colors: disc and background of each, [B, 2, 3] in -1 to 1.
    """
    share = masks[:, None] / 255
    disc_color, background = colors[:, :, :, None, None].unbind(1)
    return share * disc_color + (1 - share) * background


def paint_outlines(outlines: Tensor) -> Tensor:
    """Return conditioning images [B, 3, H, W] in -1 to 1 of outlines [B, H, W], 0 to 255."""
    return (outlines / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def _draw(circle: Circle) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a circle's mask and outline; no torch, whose threads do not survive the fork."""
    white = Circle(circle.x, circle.y, circle.radius, "white", "black")
    mask, line = (
        np.asarray(fit(image, BASE_PX).convert("L"))
        for image in (draw_disc(white), draw_outline(white))
    )
    return mask, line
