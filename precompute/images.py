"""From image bytes to VAE input; inference prepares its conditioning images with the same code.

Axes: 3 colours, H x W pixels.
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class BadImage(ValueError):
    """An image that cannot be used, and why."""


def decode(data: bytes) -> Image.Image:
    """Return an encoded image in RGB.

    Raises:
        BadImage: empty, truncated, too large, or no image at all.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except BadImage:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow names the BytesIO, which means nothing to a user.
        reason = str(error).partition(" <_io.BytesIO")[0]
        raise BadImage(f"not a readable image ({reason})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB; the upper eight bits of one with sixteen, as a depth map has."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() >> 16):
            raise BadImage(f"its values reach from {values.min()} to {values.max()}, not 16 bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("it holds floating point numbers, of unknown range; save it in 8 or 16 bit")
    return image.convert("RGB")


def load(path: Path) -> tuple[Image.Image, bytes]:
    """Return the image in a file, in RGB, and the file's bytes.

    Raises:
        BadImage: missing, or as `decode`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    return decode(data), data


def fit(image: Image.Image, resolution_px: int) -> Image.Image:
    """Return the image with its shorter side resized to `resolution_px`, then centre-cropped.

    Bilinear with antialiasing, and the same rounding as torchvision's Resize and CenterCrop, which
    the diffusers training script uses.
    """
    width, height = image.size
    short = min(width, height)
    if short != resolution_px:
        size = (
            (resolution_px, int(resolution_px * height / width))
            if width <= height
            else (int(resolution_px * width / height), resolution_px)
        )
        image = image.resize(size, Image.Resampling.BILINEAR)
    width, height = image.size
    left = round((width - resolution_px) / 2)
    top = round((height - resolution_px) / 2)
    return image.crop((left, top, left + resolution_px, top + resolution_px))


def to_uint8(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, [3, H, W], 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pixels(uint8: Tensor, pixel_range: str) -> Tensor:
    """Return pixels in the range a VAE gets them in.

    Args:
        uint8: [..., 3, H, W], 0 to 255.
        pixel_range: `-1_1`, as diffusers' VaeImageProcessor; or `0_1`.

    Returns:
        As `uint8`, float32.
    """
    unit = uint8.to(torch.float32) / 255.0
    return unit if pixel_range == "0_1" else 2.0 * unit - 1.0
