"""Encoded images: opening them, and what their headers tell before any pixel is decoded."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from sd3.color_profile import converts_to_srgb

# Up to 179 million pixels are read; Pillow warns from half of that on, which says nothing new.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What git leaves in the place of a large file, until that is fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Files that Pillow does not read, by their first bytes, and what to do about them.
FOREIGN = {
    LFS_POINTER: "it is a pointer of Git LFS, and the picture is still to be fetched: git lfs pull",
    b"\x93NUMPY": "it is a NumPy array; save it as PNG, a map in 16 bit",
    b"PF\n": "it holds floating point colours (PFM); save it as PNG",
    b"\x76\x2f\x31\x01": "it is OpenEXR; save it as PNG, a map in 16 bit",
}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# Chunks of a PNG that may hold an orientation.
PNG_TEXTS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
# How whole files end; one that does not may still be decoded, which is then tried.
ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "GIF": b"\x3b"}
FLOATS = (
    "it holds floating point numbers, of unknown range; save it in 8 or 16 bit, or give the range "
    "of a conditioning image by --conditioning-scale"
)


class BadImage(ValueError):
    """An image cannot be used; says why."""


class Header(NamedTuple):
    """What an encoded image tells without its pixels.

    Attributes:
        width: in pixels, upright; 0 if unknown.
        height: in pixels, upright; 0 if unknown.
        is_transparent: whether it may have transparent pixels.
        has_profile: whether it has a colour profile that changes its colours.
        fault: why it cannot be used; empty if nothing is known against it.
    """

    width: int = 0
    height: int = 0
    is_transparent: bool = False
    has_profile: bool = False
    fault: str = ""


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        BadImage: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open an encoded image; whatever fails inside is a `BadImage`, but for full memory.

    Raises:
        BadImage: the data is empty, truncated, too large, or no image that Pillow reads.
    """
    if not data:
        raise BadImage("the file is empty")
    for start, reason in FOREIGN.items():
        if data.startswith(start):
            raise BadImage(reason)
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS:
        _learn_heif()
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(error) from error


def read_header(data: bytes, *, takes_floats: bool = False) -> Header:
    """Return what an encoded image tells without its pixels.

    Pixels are decoded only where the file's end is not as it should be, and of a PNG whose
    orientation may stand behind them.

    Args:
        data: the file's bytes.
        takes_floats: whether floating point numbers can be used.
    """
    header = Header()
    try:
        with opened(data) as image:
            header = Header(
                is_transparent=bool(image.has_transparency_data),
                has_profile=converts_to_srgb(image),
                fault=FLOATS if image.mode == "F" and not takes_floats else "",
            )
            width, height = _upright_size(image, data)
            header = header._replace(width=width, height=height)
            if not _ends_well(data, image.format):
                image.load()
    except BadImage as error:
        return header._replace(fault=str(error))
    return header


def _upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    if image.format == "PNG" and not _may_tell_later(data):
        exif = Image.Image.getexif(image)  # PNG's own would decode the pixels to see what follows
    else:
        exif = image.getexif()
    turned = exif.get(ExifTags.Base.Orientation, 1) in range(5, 9)
    # For TIFF alone, Pillow reports the size after rotation.
    return image.size[::-1] if turned and image.format != "TIFF" else image.size


def _may_tell_later(png: bytes) -> bool:
    """Return whether an orientation may stand behind a PNG's pixels; True if it is damaged."""
    position, after_pixels = 8, False  # behind the signature
    while True:
        length, kind = png[position : position + 4], png[position + 4 : position + 8]
        if kind == b"IEND":
            return False
        if len(kind) < 4 or (after_pixels and kind in PNG_TEXTS):
            return True
        after_pixels |= kind == b"IDAT"
        position += 12 + int.from_bytes(length)


def _ends_well(data: bytes, kind: str | None) -> bool:
    if kind == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return data.endswith(ENDS.get(kind or "", b""))


def _learn_heif() -> None:
    """Have Pillow read HEIC, the format of phones' photographs.

    Raises:
        BadImage: the package for it is not installed.
    """
    try:
        import pillow_heif
    except ImportError as error:
        raise BadImage("it is HEIC, which needs a package: pip install pillow-heif") from error
    pillow_heif.register_heif_opener()


def _unreadable(error: Exception) -> BadImage:
    """Return the error for an image on which Pillow fails, with any exception."""
    if isinstance(error, UnidentifiedImageError):
        # Pillow's message names the BytesIO, which means nothing to a user.
        reason = str(error).partition(" <_io.BytesIO")[0]
    elif isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        reason = f"more than {limit / 1e6:.0f} million pixels; scale it down"
    else:
        reason = str(error)
    return BadImage(f"not a readable image ({reason or type(error).__name__})")
