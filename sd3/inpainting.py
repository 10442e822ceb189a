"""Inpainting: a picture without the part that is to be drawn anew, and the mask of that part.

As diffusers' `StableDiffusion3ControlNetInpaintingPipeline` prepares them: a mask is white where
the picture is drawn anew. There the picture is black before the VAE encodes it. The ControlNet gets
the scaled and shifted latent, and as one more channel 1 where the picture is kept and 0 where not,
of each cell of the latent grid that at its first pixel. It gets zeros for the pooled embedding.

Axes: B pictures, 4 colours (red, green, blue, alpha), H x W pixels, h x w latent grid.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageChops
from torch import Tensor

HALF = 128  # a mask is white from here on


def is_inpainting(controlnet: Mapping[str, Any]) -> bool:
    """Tell whether a ControlNet of this configuration takes a mask beside its control."""
    return controlnet.get("extra_conditioning_channels") == 1


def without_masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """Return a picture without its masked part: in RGBA, black and transparent there.

    Args:
        picture: in RGB.
        mask: of the same size; white where the picture is to be drawn anew.
    """
    holes = mask.convert("L").point([255 * (level >= HALF) for level in range(256)])
    kept = picture.convert("RGB")
    kept.paste((0, 0, 0), mask=holes)
    kept.putalpha(ImageChops.invert(holes))
    return kept


def mask_of(picture: Image.Image) -> Image.Image:
    """Return the mask of a picture in RGBA, white where it is transparent."""
    return ImageChops.invert(picture.getchannel("A"))


def kept_cells(uint8: Tensor, factor: int) -> Tensor:
    """Return which cells of the latent grid are kept: 1, or 0 where a picture is drawn anew.

    Args:
        uint8: pictures of `without_masked`, [B, 4, H, W].
        factor: pixels a cell and side.

    Returns:
        [B, 1, h, w], uint8.
    """
    return (uint8[:, 3:, ::factor, ::factor] >= HALF).to(uint8.dtype)
