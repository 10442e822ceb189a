"""From RGB images to the VAE's input.

Axes: 3 colours, H x W pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Factor and offset of pixels in [0, 1], by the range that they are to have.
SCALES = {"-1_1": (2.0, -1.0), "0_1": (1.0, 0.0), "stability_canny": (255 * 0.5, 0.5)}


def to_uint8(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, [3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_image(uint8: Tensor) -> Image.Image:
    """Return pixels [3, H, W], 0 to 255, as an RGB image; [4, H, W] as RGBA."""
    return Image.fromarray(uint8.permute(1, 2, 0).numpy())


def to_pixels(uint8: Tensor, pixel_range: str) -> Tensor:
    """Return pixels in the value range of the VAE's input.

    Args:
        uint8: [..., 3, H, W], 0 to 255.
        pixel_range: `-1_1`, as diffusers' VaeImageProcessor; `0_1`; or `stability_canny`, as
            Stability's Canny ControlNet for SD3.5-large was trained: 0.5 to 128.

    Returns:
        [..., 3, H, W], float32.
    """
    unit = uint8.to(torch.float32) / 255.0
    factor, offset = SCALES[pixel_range]
    return factor * unit + offset
