"""Circles for training the base: masks and outlines drawn once, coloured at each step.

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
# Pairs of disc colour and background, by index: those to train on, and those to test on.
TRAINED_PAIRS, HELD_OUT_PAIRS = (
    torch.tensor(
        [
            (color_index, background_index)
            for color_index, color in enumerate(NAMES)
            for background_index, background in enumerate(NAMES)
            if COLORS[color] != COLORS[background] and is_held_out(color, background) == held_out
        ]
    )
    for held_out in (False, True)
)


def caption(pair: Tensor) -> str:
    """Return the caption of a pair of colour indices."""
    color, background = pair.tolist()
    return Circle(0, 0, 0, NAMES[color], NAMES[background]).prompt


def load_shapes(path: Path, num_circles: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return masks and outlines of random circles; drawn once, then kept.

    They are drawn, resized and cropped as a data set is.

    Args:
        path: file of the shapes.
        num_circles: how many.
        seed: of the circles.

    Returns:
        Masks and outlines, each [num_circles, H, W], 0 to 255.
    """
    if not path.is_file():
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(_draw_shapes, random_circles(num_circles, seed), chunksize=64))
        masks, outlines = (
            torch.from_numpy(np.stack(images)) for images in zip(*drawn, strict=True)
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"masks": masks, "outlines": outlines}, path)
    shapes = load_file(path)
    return shapes["masks"], shapes["outlines"]


def paint_discs(masks: Tensor, colors: Tensor) -> Tensor:
    """Return pictures of discs on plain backgrounds, [B, 3, H, W] in -1 to 1.

    Args:
        masks: [B, H, W], 0 to 255.
        colors: of each disc and its background, [B, 2, 3] in -1 to 1.
    """
    coverage = masks[:, None] / 255
    disc_color, background = colors[:, :, :, None, None].unbind(1)
    return coverage * disc_color + (1 - coverage) * background


def paint_outlines(outlines: Tensor) -> Tensor:
    """Return conditioning images [B, 3, H, W] in -1 to 1 of outlines [B, H, W], 0 to 255."""
    return (outlines / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def _draw_shapes(circle: Circle) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a circle's mask and outline; without torch, whose threads do not survive a fork."""
    white = Circle(circle.x, circle.y, circle.radius, "white", "black")
    mask, line = (
        np.asarray(fit(image, BASE_PX).convert("L"))
        for image in (draw_disc(white), draw_outline(white))
    )
    return mask, line
