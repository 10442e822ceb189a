"""The scale of conditioning images: which of their numbers become black and white.

A scale is `as-is`, `auto` or `LOW:HIGH`; see `parse_scale`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd3.image_files import FLOATS, BadImage

AS_IS, AUTO = "as-is", "auto"
LARGEST_8_BIT, LARGEST_16_BIT = (1 << 8) - 1, (1 << 16) - 1
# A map that uses less of its range than this fraction, as ids or millimetres do, is nearly of one
# colour to a network.
SLIVER = 1 / 8


class Values(NamedTuple):
    """The lowest and the highest number of an image, and the highest that its format holds."""

    low: float
    high: float
    full: float

    @property
    def is_one_colour(self) -> bool:
        """Whether all its numbers are the same."""
        return self.low == self.high

    @property
    def is_sliver(self) -> bool:
        """Whether it uses a small part of its format's range, and is not of one colour."""
        return not self.is_one_colour and self.high - self.low < SLIVER * self.full


def parse_scale(text: str) -> tuple[float, float] | None:
    """Return the numbers that become black and white; None for `as-is` and `auto`.

    Raises:
        ValueError: it is none of the three forms, or the first number is not below the second.
    """
    if text in (AS_IS, AUTO):
        return None
    low, colon, high = text.partition(":")
    if not colon or not float(low) < float(high) < float("inf"):
        raise ValueError(text)
    return float(low), float(high)


def is_map(image: Image.Image) -> bool:
    """Tell whether an image holds numbers of more than 8 bit."""
    return image.mode.startswith("I") or image.mode == "F"


def map_to_grey(image: Image.Image, scale: str) -> Image.Image:
    """Return an image of numbers of more than 8 bit in 8, mode L.

    As it is, a 16 bit image gives its upper 8 bits.

    Raises:
        BadImage: its numbers have no range by themselves, and the scale gives none.
    """
    numbers = np.asarray(image)
    if scale != AS_IS:
        return Image.fromarray(_stretched(numbers, *_ends(numbers, scale)))
    if image.mode == "F":
        raise BadImage(FLOATS)
    numbers = numbers.astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() > LARGEST_16_BIT):
        raise BadImage(
            f"its values reach from {numbers.min()} to {numbers.max()}, beyond 16 bit; "
            "--conditioning-scale says which of them become black and white"
        )
    return Image.fromarray((numbers >> 8).astype(np.uint8))


def stretch(image: Image.Image, scale: str) -> Image.Image:
    """Return an 8 bit image, grey or RGB, at a scale; all colours are stretched alike.

    Raises:
        BadImage: the scale is for larger numbers.
    """
    if scale == AS_IS:
        return image
    if (ends := parse_scale(scale)) and ends[1] > LARGEST_8_BIT:
        raise BadImage(f"it holds 8 bit numbers, and the conditioning scale {scale} is for larger")
    numbers = np.asarray(image)
    return Image.fromarray(_stretched(numbers, *_ends(numbers, scale)))


def values_of(image: Image.Image) -> Values:
    """Return the lowest and highest number of an image of mode I, I;16, F, L or RGB."""
    if is_map(image):  # Pillow does not know the extrema of all of these modes
        numbers = np.asarray(image)
        low, high = float(numbers.min()), float(numbers.max())
        return Values(low, high, high - low if image.mode == "F" else LARGEST_16_BIT)
    extrema = np.reshape(image.getextrema(), (-1, 2))
    return Values(float(extrema[:, 0].min()), float(extrema[:, 1].max()), LARGEST_8_BIT)


def _ends(numbers: NDArray[np.generic], scale: str) -> tuple[float, float]:
    given = parse_scale(scale)
    if np.isnan(numbers).any() or (given is None and not np.isfinite(numbers).all()):
        raise BadImage("it holds numbers that are not finite")
    return given or (float(numbers.min()), float(numbers.max()))


def _stretched(numbers: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    unit = (numbers.astype(np.float64) - low) / (high - low if high > low else 1.0)
    stretched: NDArray[np.uint8] = np.rint(LARGEST_8_BIT * unit.clip(0, 1)).astype(np.uint8)
    return stretched
