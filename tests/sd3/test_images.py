"""From image bytes to VAE input, as diffusers does it."""

import io
import re

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw

from sd3 import images
from sd3.image_files import BadImage, read_header
from sd3.images import decode, fit
from sd3.pixels import to_pixels, to_uint8


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_decoded_images_are_rgb(mode: str) -> None:
    assert decode(encoded(Image.new(mode, (5, 7)))).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html></html>", "not a readable image (cannot identify image file)"),
        (encoded(Image.effect_noise((64, 64), 50))[:600], "not a readable image (image file is tr"),
    ],
)
def test_what_is_no_image_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert str(caught.value).startswith(reason)


def test_whatever_pillow_raises_is_a_bad_image() -> None:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "DDS"))
    data[80:84] = bytes(4)  # flags that tell the format of the pixels
    with pytest.raises(NotImplementedError):
        Image.open(io.BytesIO(data))
    message = "not a readable image (Unknown pixel format flags 0"
    with pytest.raises(BadImage, match="^" + re.escape(message)):
        decode(bytes(data))
    assert read_header(bytes(data)).fault.startswith(message)


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(0, 1 << 16, 97, dtype=np.uint16)[: 25 * 25].reshape(25, 25) * 2
    pixels = np.array(decode(encoded(Image.fromarray(values))))
    assert np.array_equal(pixels, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_numbers_of_unknown_range_are_refused() -> None:
    with pytest.raises(BadImage, match="floating point numbers"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(BadImage, match="reach from -5 to 0, beyond 16 bit"):
        decode(encoded(Image.fromarray(np.array([[-5, 0]], np.int32)), "TIFF"))


def test_a_square_of_the_right_size_is_untouched() -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    assert np.array_equal(np.array(fit(image, 64)), np.array(image))


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((200, 100), (128, 64), (32, 0, 96, 64)),
        ((100, 200), (64, 128), (0, 32, 64, 96)),
        ((90, 60), (96, 64), (16, 0, 80, 64)),
        # 64 * 101 / 100 = 64.64 is cut to 64
        ((101, 100), (64, 64), (0, 0, 64, 64)),
        ((30, 20), (96, 64), (16, 0, 80, 64)),
        # Half of 1, 3 and 5 is rounded to the even number, as torchvision's CenterCrop does.
        ((65, 64), (65, 64), (0, 0, 64, 64)),
        ((67, 64), (67, 64), (2, 0, 66, 64)),
        ((69, 64), (69, 64), (2, 0, 66, 64)),
        ((64, 67), (64, 67), (0, 2, 64, 66)),
    ],
)
def test_fit_resizes_the_shorter_side_and_crops_the_middle(
    size: tuple[int, int], resized: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = Image.effect_noise(size, 50).convert("RGB")
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    assert np.array_equal(np.array(fit(image, 64)), np.array(expected))


def test_long_thin_images_do_not_fill_the_memory() -> None:
    # Resized to a height of 2^6 it has 2^17 * 2^6 pixels, to one of 2^10 2^21 * 2^10.
    fit(Image.new("RGB", (1 << 11, 1)), 64)
    with pytest.raises(BadImage, match=r"2048 x 1 pixels, too long and thin for 1024 x 1024"):
        fit(Image.new("RGB", (1 << 11, 1)), 1024)
    assert fit(Image.new("RGB", (1, 100)), (64, 256)).size == (64, 256)


def test_pixels_equal_diffusers_own_preprocessing() -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    uint8 = to_uint8(image)[None]
    stock = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    assert torch.equal(to_pixels(uint8, "-1_1"), stock)
    unit = VaeImageProcessor(vae_scale_factor=8, do_normalize=False).preprocess(image)
    assert torch.equal(to_pixels(uint8, "0_1"), unit)
    # As SD3CannyImageProcessor, on the card of Stability's Canny.
    assert torch.equal(to_pixels(uint8, "stability_canny"), unit * 255 * 0.5 + 0.5)


def half_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 255, 0))
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "PA"])
@pytest.mark.parametrize(
    ("background", "expected"), [("white", (255,) * 3), ("#102030", (16, 32, 48))]
)
def test_transparent_pixels_show_the_background(
    mode: str, background: str, expected: tuple[int, int, int]
) -> None:
    image = half_transparent("RGBA" if mode == "PA" else mode)
    decoded = decode(encoded(image), background)
    assert decoded.getpixel((1, 0)) == expected
    assert decoded.getpixel((0, 0)) == ((76,) * 3 if mode == "LA" else (255, 0, 0))


def test_half_a_colour_is_mixed_with_the_background() -> None:
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 51))  # one fifth
    assert decode(encoded(image)).getpixel((0, 0)) == (244, 224, 204)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int, kind: str) -> None:
    upright = Image.effect_noise((40, 24), 50).convert("RGB")
    # How a camera stores it: the inverse of what the orientation asks the viewer to do.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, kind, exif=exif)
    assert np.array_equal(np.array(decode(buffer.getvalue())), np.array(upright))
    assert read_header(buffer.getvalue())[:2] == upright.size


def test_inks_become_colours() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    pixel = decode(encoded(image, "TIFF")).getpixel((3, 3))
    assert pixel == (255, 0, 0)


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_a_conditioning_image_comes_to_the_place_of_its_image(scale: float) -> None:
    size = (200, 120)
    # A dot where the image has one, drawn in another size.
    position = (130, 60)
    conditioning = Image.new("RGB", tuple(int(side * scale) for side in size))
    box = [int((p + d) * scale) for d in (-10, 10) for p in position]
    ImageDraw.Draw(conditioning).ellipse(box, "white")
    whole = Image.new("RGB", size)
    ImageDraw.Draw(whole).ellipse([p + d for d in (-10, 10) for p in position], "white")

    def centre(image: Image.Image) -> tuple[float, float]:
        values = np.array(image.convert("L"), float)
        rows, columns = np.indices(values.shape)
        return (values * columns).sum() / values.sum(), (values * rows).sum() / values.sum()

    found = fit(conditioning, 64, size)
    assert found.size == (64, 64)
    assert centre(found) == pytest.approx(centre(fit(whole, 64)), abs=0.6)


def test_a_conditioning_image_is_cropped_as_its_image() -> None:
    # 64 / 300 of 500 is 106.7, of 504 it is 107.5.
    conditioning = Image.effect_noise((504, 300), 50).convert("RGB")
    found = fit(conditioning, 64, (500, 300))
    expected = conditioning.resize((106, 64), Image.Resampling.BILINEAR).crop((21, 0, 85, 64))
    assert np.array_equal(np.array(found), np.array(expected))


def test_what_a_drawing_leaves_out_is_black() -> None:
    drawn = Image.new("RGBA", (64, 64))
    drawn.putpixel((5, 7), (255, 255, 255, 255))
    pixels = np.array(images.annotated(Image.new("RGB", (64, 64), "red"), lambda _: drawn))
    assert pixels[7, 5].tolist() == [255, 255, 255]
    assert pixels.sum() == 3 * 255


@pytest.mark.parametrize(
    ("control", "image", "fits"),
    [
        ((704, 512), (1000, 700), True),  # rounded to 64
        ((1024, 704), (1000, 700), True),
        ((33, 21), (33, 22), True),  # one pixel off
        ((32, 22), (33, 22), True),
        ((31, 22), (33, 22), False),  # two pixels, which are more than a sixteenth
        ((63, 44), (65, 44), True),  # 64 x 43.3, a pixel more or less
        ((62, 44), (65, 44), False),
        # 32 of 512 px are the most, a sixteenth, though 544 x 480 rounds to 512 x 512 too.
        ((512, 512), (1088, 1024), True),
        ((512, 512), (1089, 1024), False),
        ((512, 512), (544, 480), False),
        ((256, 256), (272, 256), True),
        ((256, 256), (273, 256), False),
        # Of multiples of 8, four pixels: 1012 to 1020 wide, 404 to 412 high.
        ((1016, 408), (1020, 404), True),
        ((1016, 408), (1021, 404), False),
        ((513, 512), (544, 512), False),
        ((512, 704), (700, 1000), True),
    ],
)
def test_rounded_sides_are_stretched_back(
    control: tuple[int, int], image: tuple[int, int], fits: bool
) -> None:
    drawn = Image.effect_noise(control, 50).convert("RGB")
    if not fits:
        with pytest.raises(BadImage, match="of another shape than its image's"):
            fit(drawn, 64, image)
        return
    # In one step to the size that the image itself is resized to, then cropped as the image.
    wide, high = (64 * side // min(image) for side in image)
    resized = drawn.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (round((side - 64) / 2) for side in resized.size)
    expected = resized.crop((left, top, left + 64, top + 64))
    assert fit(drawn, 64, image).tobytes() == expected.tobytes()


def test_another_shape_is_stretched_or_cropped_where_that_is_asked_for() -> None:
    """A control of 96 x 64 for an image of 64 x 64: a third of it goes, or it becomes narrower."""
    columns = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (64, 96, 3))
    control = Image.fromarray(columns.copy())
    cropped = np.asarray(fit(control, 64, (64, 64), "crop"))
    assert (cropped == columns[:, 16:80]).all()
    stretched = fit(control, 64, (64, 64), "stretch")
    assert stretched.tobytes() == control.resize((64, 64), Image.Resampling.BILINEAR).tobytes()
    for other_shape in ("refuse", "stretch", "crop"):  # of its shape, it is its image's in any case
        fits = fit(control, 64, (192, 128), other_shape)
        assert fits.tobytes() == fit(control, 64).tobytes()


def test_a_pair_of_two_shapes_is_refused() -> None:
    fit(Image.new("RGB", (100, 101)), 64, (512, 512))
    with pytest.raises(BadImage, match="100 x 103 pixels, of another shape than its image's 51"):
        fit(Image.new("RGB", (100, 103)), 64, (512, 512))
