"""From image files to fitted RGB images; stage 1 and inference use the same code."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from PIL import Image, ImageChops, ImageOps

from sd3.color_profile import to_srgb
from sd3.image_files import BadImage, opened, read_file
from sd3.value_scale import AS_IS, is_map, map_to_grey, stretch

BACKGROUND, WHITE = "white", (255, 255, 255)
LARGEST_ASPECT_DIFFERENCE = 0.01
# Annotators round their drawings' sides to multiples of these, and others to whole pixels.
ROUNDED_TO_PX = (64, 8)
LARGEST_ROUNDING = 1 / 16
# What becomes of conditioning images of another shape than their images'.
OtherShape = Literal["refuse", "stretch", "crop"]
OTHER_SHAPE_TAKEN = "; --conditioning-fit stretch or crop takes it"
# 0.4 GB in RGB; an image at 1024 pixels reaches it if it is 128 times as long as wide.
LARGEST_RESIZED_PX = 1 << 27


def decode(data: bytes, background: str = BACKGROUND) -> Image.Image:
    """Return an encoded image in RGB, upright, its colours in sRGB.

    Args:
        data: a file that Pillow reads, of any mode; EXIF orientation and a colour profile are
            applied.
        background: colour behind transparent pixels, in a form of Pillow's ImageColor.

    Raises:
        BadImage: the data is empty, truncated, too large, or no image.
    """
    with opened(data) as image:
        return _to_rgb(to_srgb(ImageOps.exif_transpose(image)), background)


def decode_conditioning(
    data: bytes, background: str = BACKGROUND, scale: str = AS_IS
) -> Image.Image:
    """Return an encoded conditioning image in RGB, upright.

    Its pixels are data, not colours: a colour profile is not applied.

    Args:
        data: a file that Pillow reads, of any mode; EXIF orientation is applied.
        background: colour behind transparent pixels, in a form of Pillow's ImageColor.
        scale: which of its numbers become black and white; see `value_scale`.

    Raises:
        BadImage: the data is empty, truncated, too large, or no image; or its numbers do not go
            with the scale.
    """
    return at_scale(conditioning_numbers(data, background), scale)


def decode_for_inpainting(data: bytes) -> tuple[Image.Image, Image.Image]:
    """Return an encoded image in RGB and, as a mask, its transparent part: white there, in grey.

    Both are upright, and the image's colours are in sRGB: those of the transparent part too, which
    an editor keeps or makes black.

    Raises:
        BadImage: nothing of it is transparent; or it is truncated, too large, or no image.
    """
    with opened(data) as image:
        picture = to_srgb(ImageOps.exif_transpose(image)).convert("RGBA")
    mask = ImageChops.invert(picture.getchannel("A"))
    if not mask.getbbox():
        raise BadImage("no part of it is transparent, and that part would be drawn anew")
    return picture.convert("RGB"), mask


def conditioning_numbers(data: bytes, background: str = BACKGROUND) -> Image.Image:
    """Return an encoded conditioning image with its own numbers, upright; see `at_scale`.

    Returns:
        Mode I, I;16 or F if it holds numbers of more than 8 bit, otherwise RGB.

    Raises:
        BadImage: the data is empty, truncated, too large, or no image.
    """
    with opened(data) as image:
        return _over(ImageOps.exif_transpose(image), background)


def at_scale(image: Image.Image, scale: str) -> Image.Image:
    """Return an image of numbers in RGB; of 16 bit as they are, the upper 8 bits.

    Raises:
        BadImage: its numbers do not go with the scale.
    """
    return map_to_grey(image, scale).convert("RGB") if is_map(image) else stretch(image, scale)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    return at_scale(_over(image, background), AS_IS)


def _over(image: Image.Image, background: str) -> Image.Image:
    """Return an image in RGB over a background, or a map as it is."""
    if is_map(image):
        image.load()
        return image
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
    data = read_file(path)
    return decode(data, background), data


def fit(
    image: Image.Image,
    size_px: int | tuple[int, int],
    like: tuple[int, int] | None = None,
    other_shape: OtherShape = "refuse",
) -> Image.Image:
    """Return the image resized to just cover `size_px`, then centre-cropped to it.

    Bilinear with antialiasing, and for a square the same rounding as torchvision's Resize and
    CenterCrop, which the diffusers training script uses.

    Args:
        image: in RGB.
        size_px: width and height of the result, or the side of a square.
        like: for a conditioning image, width and height of its image. The result then matches
            that image's crop pixel for pixel.
        other_shape: what becomes of an image whose aspect ratio is not that of `like`: it is
            refused, or stretched to it, or cropped as if it were an image itself.

    Raises:
        BadImage: the image is refused, or so long and thin that it would fill the memory.
    """
    width, height = like or image.size
    if fault := shape_fault(image.size, (width, height)):
        if other_shape == "refuse":
            raise BadImage(fault + OTHER_SHAPE_TAKEN)
        if other_shape == "crop":
            width, height = image.size
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


def shape_fault(size: tuple[int, int], like: tuple[int, int]) -> str:
    """Return why a conditioning image cannot be laid over its image; empty if it can.

    Args:
        size: width and height of the conditioning image.
        like: width and height of its image.
    """
    if has_shape_of(size, like) or is_rounded(size, like):
        return ""
    wrong, right = ("{} x {}".format(*sides) for sides in (size, like))
    return f"{wrong} pixels, of another shape than its image's {right}"


def has_shape_of(size: tuple[int, int], like: tuple[int, int]) -> bool:
    """Tell whether two images have one aspect ratio, to 1 %."""
    wide, high = size[0] * like[1], size[1] * like[0]
    return abs(wide - high) <= LARGEST_ASPECT_DIFFERENCE * min(wide, high)


def is_rounded(size: tuple[int, int], like: tuple[int, int]) -> bool:
    """Tell whether rounding alone gave a conditioning image another aspect ratio than its image's.

    That is if its image, at some scale, has sides that round to it: to multiples of 64 or 8 if
    both sides are such, or else to within a pixel.

    The ratios then differ by a sixteenth at most. `controlnet-aux` and ControlNet's own annotators
    bring the shorter side to a multiple of 64, 512 unless told otherwise, and round the longer one
    to such, by up to 32 of 512 px. Both sides rounded to multiples of 8 are off by up to 4 px each:
    by 8 of 128 px.
    """
    step = next((px for px in ROUNDED_TO_PX if size[0] % px == size[1] % px == 0), 2)
    reach, (width, height) = step // 2, size
    wide, high = width * like[1], height * like[0]
    return (
        (width - reach) * like[1] <= (height + reach) * like[0]
        and (height - reach) * like[0] <= (width + reach) * like[1]
        and abs(wide - high) <= LARGEST_ROUNDING * min(wide, high)
    )


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
    if fault := shape_fault(drawn.size, size_px):
        raise BadImage(fault)
    return fit(_to_rgb(drawn, "black"), size_px, like=size_px)


def not_drawn(error: Exception) -> BadImage:
    """Return the error for an image from which an annotator draws nothing."""
    reason = " ".join(str(error).split())
    return BadImage(f"no conditioning image from it ({type(error).__name__}: {reason})")
