"""Embedded colour profiles: photographs in other colour spaces than sRGB come to sRGB.

Relative colorimetric, with black point compensation: what both spaces have keeps its colour, and
what sRGB lacks takes its nearest. Source: ICC.1:2022, annex A.
"""

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Which pixels a profile's colour space is for, and the modes of images that have such pixels.
PIXELS = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
MODES = {"RGB": ("RGB", "RGBA", "P", "PA"), "L": ("L", "LA"), "CMYK": ("CMYK",)}
# A profile that moves no colour further, of 255, is sRGB, whatever its name: its makers round.
LARGEST_ROUNDING = 3
GRID = np.linspace(0, 255, 9).astype(np.uint8)


def converts_to_srgb(image: Image.Image) -> bool:
    """Tell whether an image has a colour profile that changes its colours; pixels are not read."""
    return _transform_of(image) is not None


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image with its colours in sRGB; itself if they are, or if it does not say.

    Returns:
        RGB, or RGBA if it has transparent pixels.
    """
    found = _transform_of(image)
    if found is None:
        return image
    pixels, transform = found
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA" if pixels == "RGB" else "LA")
        alpha = image.getchannel("A")
    converted: Image.Image = transform.apply(image.convert(pixels))
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _transform_of(image: Image.Image) -> tuple[str, Any] | None:
    """Return the pixels that an image's profile is for, and the transform; None without need."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return None
    found = _transform(profile)
    return found if found and image.mode in MODES[found[0]] else None


@lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, Any] | None:
    """Return the pixels that a profile is for, and its transform to sRGB.

    None if it is sRGB itself, damaged, or of another colour space.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        pixels = PIXELS.get(opened.profile.xcolor_space.strip())
        if pixels is None:
            return None
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            pixels,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if pixels == "CMYK":
        return pixels, transform
    return None if _moves_nothing(pixels, transform) else (pixels, transform)


def _moves_nothing(pixels: str, transform: Any) -> bool:
    """Tell whether a transform leaves all colours of a grid where they are."""
    colours = np.stack(np.meshgrid(GRID, GRID, GRID), axis=-1).reshape(1, -1, 3)
    if pixels == "L":
        colours = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    source = Image.fromarray(colours[..., 0] if pixels == "L" else colours)
    moved = np.asarray(transform.apply(source)).astype(int) - colours
    return bool(np.abs(moved).max() <= LARGEST_ROUNDING)
