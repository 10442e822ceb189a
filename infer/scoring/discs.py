"""Finds the disc in a picture, and compares it with an outline and with colour names.

Axes: H x W pixels, 3 colours.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops
from skimage.morphology import disk, opening

# CIEDE2000; below this a disc cannot be told from its background, as 1 is just noticeable.
LEAST_CONTRAST = 2.0
# Share of its bounding circle that a region must fill to count as a disc; a square fills 0.64.
LEAST_ROUNDNESS = 0.75
LEAST_LIGHT = 1 / 8  # brightness of an outline; 1 is white
# Mean distance of an outline from a circle, over the radius; a filled disc has 0.28.
LARGEST_MISFIT = 0.1
LEAST_AREA = 0.002  # share of the picture
BORDER = 1 / 16  # share of the picture's side; the border's median is the background

Mask = NDArray[np.bool_]
Color = tuple[int, int, int]


@dataclass(frozen=True)
class Disc:
    """A disc, or a patch of any shape, found in a picture.

    Attributes:
        mask: its pixels, [H, W].
        color: its median colour, sRGB in 0 to 255, [3].
    """

    mask: Mask
    color: NDArray[np.float64]


@dataclass(frozen=True)
class DiscScore:
    """How a picture agrees with its outline and its caption.

    Attributes:
        iou: of the found disc and the outline's, intersection over union; 0 if none was found.
        color_error: CIEDE2000 of the found disc and the caption's colour; None if none was found.
        background_error: CIEDE2000 of the background and the caption's.
    """

    iou: float
    color_error: float | None
    background_error: float


def measure_disc(
    picture: Image.Image, outline: Image.Image, color: Color, background: Color
) -> DiscScore:
    """Compare a picture with its conditioning outline and its caption's colours.

    Args:
        picture: RGB.
        outline: a light circle on black, as large as the picture.
        color: the caption's colour of the disc, sRGB in 0 to 255.
        background: the caption's colour of the background, sRGB in 0 to 255.
    """
    pixels = np.asarray(picture.convert("RGB"))
    disc = find_disc(pixels)
    return DiscScore(
        iou=iou(disc.mask, outlined_disc(outline)) if disc else 0.0,
        color_error=color_difference(disc.color, color) if disc else None,
        background_error=color_difference(background_color(pixels), background),
    )


def find_disc(pixels: NDArray[np.uint8]) -> Disc | None:
    """Return the disc in a picture [H, W, 3], or None if nothing round stands out."""
    patch = find_patch(pixels)
    if patch is None:
        return None
    area = np.count_nonzero(patch.mask)
    is_round = area >= LEAST_ROUNDNESS * _area_around(patch.mask)
    return patch if is_round and area >= LEAST_AREA * patch.mask.size else None


def find_patch(pixels: NDArray[np.uint8]) -> Disc | None:
    """Return what stands out from a picture's background, of whatever shape; None if nothing does.

    The background's colour is that of the picture's border. Pixels that differ from it by more than
    Otsu's threshold are foreground; the largest connected piece of it gives the patch's colour. The
    patch is the pixels nearer to that colour than to the background's, so that the fringes of a
    third colour that decoders leave along edges do not count. An opening by one pixel cuts off
    hairlines.
    """
    background = background_color(pixels)
    lab = rgb2lab(pixels)
    distance = deltaE_ciede2000(lab, _lab(background))
    if distance.max() < LEAST_CONTRAST:
        return None
    foreground = _largest(distance > threshold_otsu(distance))
    nearer = deltaE_ciede2000(lab, _lab(np.median(pixels[foreground], axis=0))) < distance
    mask = _largest(opening(nearer, disk(1)))
    if not mask.any():
        return None
    color = np.median(pixels[mask], axis=0)
    return Disc(mask, color) if color_difference(color, background) >= LEAST_CONTRAST else None


def _largest(mask: Mask) -> Mask:
    """Return the largest connected piece of a mask."""
    pieces = label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    largest: Mask = pieces == sizes.argmax()
    return largest if sizes.any() else mask


def _area_around(mask: Mask) -> float:
    """Return the area of the circle whose diameter is between a mask's two farthest points."""
    (region,) = regionprops(mask.astype(np.uint8))
    return float(np.pi * (region.feret_diameter_max / 2) ** 2)


def outlined_disc(outline: Image.Image) -> Mask:
    """Return the pixels of the disc that an outline encloses, [H, W].

    A circle is fitted to the light by least squares (Kasa 1976, IEEE Trans. Instrum. Meas. 25). It
    runs through the middle of the line. The line's width, and so the outer edge, follows from the
    sum of the light.

    Raises:
        ValueError: the image has no outline, or one that is not a circle's.
    """
    light = np.asarray(outline.convert("L")) / 255.0
    if light.max() < LEAST_LIGHT:
        raise ValueError("the conditioning image has no outline")
    rows, columns = np.nonzero(light)
    weight = np.sqrt(light[rows, columns])
    y, x = rows + 0.5, columns + 0.5
    unknowns = np.stack([2 * x, 2 * y, np.ones_like(x)], axis=1) * weight[:, None]
    solution, *_ = np.linalg.lstsq(unknowns, (x**2 + y**2) * weight)
    center_x, center_y = solution[:2]
    squared_radius = solution[2] + center_x**2 + center_y**2
    radius = np.sqrt(max(squared_radius, 0.0))
    distance = np.abs(np.hypot(x - center_x, y - center_y) - radius)
    if not np.average(distance, weights=weight) < LARGEST_MISFIT * radius:
        raise ValueError("the conditioning image is not a circle's outline")
    outer = radius + light.sum() / (2 * np.pi * radius) / 2
    grid_y, grid_x = np.ogrid[: light.shape[0], : light.shape[1]]
    mask: Mask = (grid_y + 0.5 - center_y) ** 2 + (grid_x + 0.5 - center_x) ** 2 <= outer**2
    return mask


def background_color(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the median colour of a picture's border, [3]."""
    width = max(1, round(BORDER * min(pixels.shape[:2])))
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[width:-width, width:-width] = False
    median: NDArray[np.float64] = np.median(pixels[border], axis=0)
    return median


def iou(first: Mask, second: Mask) -> float:
    """Return the intersection over the union of two masks."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def color_difference(
    first: NDArray[np.float64] | Color, second: NDArray[np.float64] | Color
) -> float:
    """Return the CIEDE2000 difference of two sRGB colours, 0 to 255."""
    return float(deltaE_ciede2000(_lab(first), _lab(second)).item())


def caption_colors(caption: str) -> tuple[Color, Color]:
    """Return the colours of disc and background that a caption names.

    Raises:
        ValueError: the caption is not "<CSS colour> circle with <CSS colour> background".
    """
    match = re.fullmatch(r"(.+) circle with (.+) background", caption)
    if match is None:
        raise ValueError(f"not a caption of a circle: {caption!r}")
    first, second = (ImageColor.getrgb(name.replace(" ", ""))[:3] for name in match.groups())
    return first, second


def _lab(color: NDArray[np.float64] | Color) -> NDArray[np.float64]:
    lab: NDArray[np.float64] = rgb2lab(np.asarray(color, dtype=np.float64).reshape(1, 1, 3) / 255)
    return lab
