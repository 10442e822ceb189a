"""Annotators that take something away from a picture, which the ControlNet learns to restore."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from xxhash import xxh3_64_intdigest

# A stroke of a mask: corners, and its length and width as shares of the picture's shorter side.
MOST_CORNERS = 8
STROKE_LENGTH, STROKE_WIDTH = (0.1, 0.4), (0.04, 0.15)


def blur(image: Image.Image, radius: float = 8.0) -> Image.Image:
    """Return the picture blurred, by a Gaussian of `radius` pixels as Pillow computes it."""
    if radius < 0:
        raise ValueError("radius must be at least 0")
    return image.filter(ImageFilter.GaussianBlur(radius))


def grey(image: Image.Image) -> Image.Image:
    """Return the picture without its colours."""
    return image.convert("L").convert("RGB")


def superres(image: Image.Image, factor: float = 8.0) -> Image.Image:
    """Return the picture at a `factor` of its resolution, enlarged again, both bicubic."""
    if factor < 1:
        raise ValueError("factor must be at least 1")
    small = [max(1, round(side / factor)) for side in image.size]
    bicubic = Image.Resampling.BICUBIC
    return image.resize((small[0], small[1]), bicubic).resize(image.size, bicubic)


def jpeg(image: Image.Image, quality: int = 10) -> Image.Image:
    """Return the picture as it comes back from a JPEG file of this quality, 1 to 95."""
    if not 1 <= quality <= 95:
        raise ValueError("quality must be in 1 to 95")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    with Image.open(file) as again:
        return again.convert("RGB")


def strokes(
    image: Image.Image, least: float = 0.1, most: float = 0.5, seed: int = 0
) -> Image.Image:
    """Return random strokes, white on black: a mask for inpainting, the same for the same pixels.

    Args:
        image: the picture that they are for.
        least: share of the picture that they cover at least, and
        most: at most, by about a stroke: the share is drawn between both.
        seed: another number gives other strokes.
    """
    return _random_strokes(image, least, most, seed).convert("RGB")


def mask(
    image: Image.Image,
    least: float = 0.1,
    most: float = 0.5,
    colour: str = "black",
    seed: int = 0,
) -> Image.Image:
    """Return the picture with random strokes painted over it, the same for the same pixels.

    Args:
        image: the picture.
        least: share of the picture that is covered at least, and
        most: at most, by about a stroke: the share is drawn between both.
        colour: of what is covered, in a form of Pillow's ImageColor.
        seed: another number gives other strokes.
    """
    holes = _random_strokes(image, least, most, seed)
    covered = image.copy()
    covered.paste(Image.new("RGB", image.size, colour), mask=holes)
    return covered


def _random_strokes(image: Image.Image, least: float, most: float, seed: int) -> Image.Image:
    if not 0 <= least <= most <= 1:
        raise ValueError("least and most must be in 0 to 1, least the smaller")
    rng = np.random.default_rng(xxh3_64_intdigest(image.tobytes(), seed=seed))
    share = rng.uniform(least, most)
    holes = Image.new("1", image.size)
    while np.asarray(holes).mean() < share:
        _paint_stroke(holes, rng)
    return holes


def _paint_stroke(holes: Image.Image, rng: np.random.Generator) -> None:
    side = min(holes.size)
    width = max(1, round(side * rng.uniform(*STROKE_WIDTH)))
    corners = [rng.uniform(0, holes.size)]
    for _ in range(int(rng.integers(2, MOST_CORNERS + 1))):
        angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(*STROKE_LENGTH)
        step = length * np.array([np.cos(angle), np.sin(angle)])
        corners.append(np.clip(corners[-1] + step, 0, holes.size))
    points = [(float(x), float(y)) for x, y in corners]
    draw = ImageDraw.Draw(holes)
    draw.line(points, fill=1, width=width)
    for x, y in points:  # round ends and joints
        draw.circle((x, y), width / 2, fill=1)
