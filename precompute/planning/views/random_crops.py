"""Random crops of a picture: where they lie, and what lies in them.

A box is (left, top, right, bottom) in whole pixels of the picture, upright.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from sd3.image_files import BadImage
from sd3.images import OTHER_SHAPE_TAKEN, OtherShape, shape_fault

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RandomCrops:
    """How the random crops of all pictures are drawn.

    A crop depends on nothing but these settings, the picture's file and the crop's number.

    Attributes:
        seed: of the draws.
        least: sides of the smallest crop, as a share of those of the largest that fits a picture.
        most: the same of the largest crop.
    """

    seed: int
    least: float
    most: float

    def box(self, picture: str, number: int, size: Size, shape: Size) -> Box:
        """Return where a crop lies: its scale is uniform, and so is its place.

        Args:
            picture: digest of the picture's file.
            number: of the crop, from 1.
            size: width and height of the picture.
            shape: width and height that the crop is resized to; it has their aspect ratio, but for
                rounding to whole pixels.
        """
        scale, x, y = (self._draw(f"{what} {number} {picture}") for what in ("scale", "x", "y"))
        scale = self.least + scale * (self.most - self.least)
        width, height = (max(1, round(scale * side)) for side in largest_inside(size, shape))
        left, top = int(x * (size[0] - width + 1)), int(y * (size[1] - height + 1))
        return left, top, left + width, top + height

    def _draw(self, what: str) -> float:
        """Return a uniform number from 0 to below 1."""
        return (xxh3_64_intdigest(what.encode(), seed=self.seed) >> 11) / (1 << 53)

    def bits(self, numbers: int) -> NDArray[np.uint64]:
        """Return what is flipped in a picture's digest to get its crops', [numbers + 1, 2].

        The first, for the crop that is not random, is 0.
        """
        settings = f"of seed {self.seed}, {self.least!r} to {self.most!r}"
        random = (
            xxh3_128_digest(f"crop {number} {settings}".encode())
            for number in range(1, numbers + 1)
        )
        return np.frombuffer(bytes(16) + b"".join(random), ">u8").astype(np.uint64).reshape(-1, 2)


def parse_crop_scale(value: str) -> tuple[float, float]:
    """Return the two numbers of `LOW:HIGH`.

    Raises:
        ValueError: it is something else, or not 0 < LOW <= HIGH <= 1.
    """
    least, most = map(float, value.split(":"))
    if not 0 < least <= most <= 1:
        raise ValueError(value)
    return least, most


def largest_inside(size: Size, shape: Size) -> tuple[float, float]:
    """Return width and height of the largest rectangle of a shape that fits a picture."""
    (width, height), (to_width, to_height) = size, shape
    if width * to_height <= height * to_width:
        return width, width * to_height / to_width
    return height * to_width / to_height, height


def cut(
    image: Image.Image,
    box: Box,
    size_px: Size,
    like: Size | None = None,
    other_shape: OtherShape = "refuse",
) -> Image.Image:
    """Return what lies in a box, resized: bilinear, with antialiasing.

    Args:
        image: in RGB.
        box: of the picture.
        size_px: width and height of the result.
        like: for a conditioning image, width and height of its picture; the box then takes the same
            part of it, to a fraction of a pixel.
        other_shape: what becomes of an image whose aspect ratio is not that of `like`: it is
            refused, or stretched to it, or first cut to it about its centre.

    Raises:
        BadImage: the image is refused.
    """
    like = like or image.size
    left, top, width, height = 0.0, 0.0, float(image.width), float(image.height)
    if fault := shape_fault(image.size, like):
        if other_shape == "refuse":
            raise BadImage(fault + OTHER_SHAPE_TAKEN)
        if other_shape == "crop":
            width, height = largest_inside(image.size, like)
            left, top = (image.width - width) / 2, (image.height - height) / 2
    across, down = width / like[0], height / like[1]
    part = (
        left + box[0] * across,
        top + box[1] * down,
        min(left + box[2] * across, image.width),
        min(top + box[3] * down, image.height),
    )
    return image.resize(size_px, Image.Resampling.BILINEAR, box=part)
