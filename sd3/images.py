"""From image files to fitted RGB images; stage 1 and inference use the same code."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

BACKGROUND = "white"
LARGEST_ASPECT_DIFFERENCE = 0.01
# 0.4 GB in RGB; an image at 1024 pixels reaches it if it is 128 times as long as wide.
LARGEST_RESIZED_PX = 1 << 27


class BadImage(ValueError):
    """An image cannot be used; says why."""


def decode(data: bytes, background: str = BACKGROUND) -> Image.Image:
    """Return an encoded image in RGB, upright.

    Args:
        data: a file that Pillow reads, of any mode; EXIF orientation is applied.
        background: colour behind transparent pixels, in a form of Pillow's ImageColor.

    Raises:
        BadImage: the data is empty, truncated, too large, or no image.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(ImageOps.exif_transpose(image), background)
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(error) from error


def size(data: bytes) -> tuple[int, int]:
    """Return width and height of an encoded image, upright, without decoding its pixels.

    Raises:
        BadImage: the data is no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
            # For TIFF alone, Pillow reports the size after rotation.
            return image.size[::-1] if turned and image.format != "TIFF" else image.size
    except MemoryError:
        raise
    except Exception as error:
        raise _unreadable(error) from error


def has_transparency(data: bytes) -> bool:
    """Tell whether an encoded image may have transparent pixels, without decoding them."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return bool(image.has_transparency_data)
    except MemoryError:
        raise
    except Exception:
        return False  # no image


def _unreadable(error: Exception) -> BadImage:
    """Return the error for an image on which Pillow fails, with any exception."""
    # Pillow's message names the BytesIO, which means nothing to a user.
    reason = str(error).partition(" <_io.BytesIO")[0]
    return BadImage(f"not a readable image ({reason or type(error).__name__})")


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    """Return an image in RGB; of 16 bit images, such as depth maps, the upper 8 bits."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() >> 16):
            raise BadImage(f"its values reach from {values.min()} to {values.max()}, not 16 bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("it holds floating point numbers, of unknown range; save it in 8 or 16 bit")
    if image.has_transparency_data:
        layers = Image.new("RGBA", image.size, background), image.convert("RGBA")
        image = Image.alpha_composite(*layers)
    return image.convert("RGB")


def load(path: Path, background: str = BACKGROUND) -> tuple[Image.Image, bytes]:
    """Return the image in a file, in RGB, and the file's bytes.

    Args:
        path: of the file.
        background: colour behind transparent pixels.

    Raises:
        BadImage: the file is missing, or no image that can be used.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error
    return decode(data, background), data


def fit(
    image: Image.Image, size_px: int | tuple[int, int], like: tuple[int, int] | None = None
) -> Image.Image:
    """Return the image resized to just cover `size_px`, then centre-cropped to it.

    Bilinear with antialiasing, and for a square the same rounding as torchvision's Resize and
    CenterCrop, which the diffusers training script uses.

    Args:
        image: in RGB.
        size_px: width and height of the result, or the side of a square.
        like: for a conditioning image, width and height of its image. The result then matches
            that image's crop pixel for pixel.

    Raises:
        BadImage: the image's aspect ratio is not that of `like`, or it is so long and thin that
            it would fill the memory.
    """
    width, height = like or image.size
    wide, high = image.width * height, image.height * width
    if abs(wide - high) > LARGEST_ASPECT_DIFFERENCE * min(wide, high):
        raise BadImage(
            f"{image.width} x {image.height} pixels, of another shape than its image's "
            f"{width} x {height}"
        )
    to_width, to_height = (size_px, size_px) if isinstance(size_px, int) else size_px
    if width * to_height <= height * to_width:
        resized = to_width, int(to_width * height / width)
    else:
        resized = int(to_height * width / height), to_height
    if resized[0] * resized[1] > LARGEST_RESIZED_PX:
        raise BadImage(f"{width} x {height} pixels, too long and thin for {to_width} x {to_height}")
    if image.size != resized:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left = round((resized[0] - to_width) / 2)
    top = round((resized[1] - to_height) / 2)
    return image.crop((left, top, left + to_width, top + to_height))


def annotated(image: Image.Image, annotator: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return the conditioning image that a function draws from a fitted image, in its size.

    Raises:
        BadImage: the function fails, or returns no image of the same aspect ratio.
    """
    try:
        drawn = annotator(image)
    except Exception as error:  # whatever the user's own code raises
        raise not_drawn(error) from error
    return as_drawn(drawn, image.size)


def as_drawn(drawn: object, size_px: tuple[int, int]) -> Image.Image:
    """Return what an annotator has drawn as a conditioning image of a fitted image's size.

    Raises:
        BadImage: it is no image, or of another aspect ratio.
    """
    if not isinstance(drawn, Image.Image):
        raise BadImage(f"the conditioning image drawn from it is {type(drawn).__name__}, no image")
    return fit(_to_rgb(drawn, "black"), size_px, like=size_px)


def not_drawn(error: Exception) -> BadImage:
    """Return the error for an image from which an annotator draws nothing."""
    reason = " ".join(str(error).split())
    return BadImage(f"no conditioning image from it ({type(error).__name__}: {reason})")
