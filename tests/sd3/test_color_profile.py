"""Colour profiles: photographs come to sRGB, and nothing else changes."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd3.image_files import read_header
from sd3.images import decode, decode_conditioning
from tests.sd3.icc import P3, SRGB, p3_in_srgb, profile

DISPLAY_P3, OWN_SRGB, SQUARE = profile(P3), profile(SRGB), profile(SRGB, b"GRAY")
LCMS_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colours() -> Image.Image:
    """Return a picture of many colours; the first is (200, 60, 40)."""
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    pixels[0, 0] = 200, 60, 40
    return Image.fromarray(pixels)


def encoded(image: Image.Image, icc: bytes | None, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=icc)
    return file.getvalue()


def test_display_p3_comes_to_srgb() -> None:
    image = colours()
    found = np.asarray(decode(encoded(image, DISPLAY_P3)))
    expected = p3_in_srgb(np.asarray(image))
    assert np.abs(found - expected).max() <= 1.5
    # By the formula: far more red, since P3's red is deeper than sRGB's.
    assert np.abs(expected[0, 0] - [217, 42, 23]).max() < 1
    # And back: what a phone stores as (186, 71, 50) is sRGB's (200, 60, 40).
    stored = Image.new("RGB", (4, 4), (186, 71, 50))
    pixel = decode(encoded(stored, DISPLAY_P3)).getpixel((1, 1))
    assert np.abs(np.subtract(pixel, (200, 60, 40))).max() <= 1


@pytest.mark.parametrize("icc", [None, OWN_SRGB, LCMS_SRGB, b"no profile", DISPLAY_P3[:150]])
def test_srgb_and_what_cannot_be_read_stay_as_they_are(icc: bytes | None) -> None:
    data = encoded(colours(), icc)
    assert decode(data).tobytes() == colours().tobytes()
    assert not read_header(data).has_profile


def test_the_header_tells_what_is_converted() -> None:
    assert read_header(encoded(colours(), DISPLAY_P3)).has_profile
    assert read_header(encoded(colours(), DISPLAY_P3, "JPEG")).has_profile
    # A profile for other pixels than the image's says nothing.
    grey = encoded(colours().convert("L"), DISPLAY_P3)
    assert not read_header(grey).has_profile
    assert decode(grey).tobytes() == colours().convert("L").convert("RGB").tobytes()


def test_transparent_pixels_are_converted_and_stay_transparent() -> None:
    image = colours()
    image.putalpha(Image.new("L", image.size, 0))
    image.putpixel((0, 0), (200, 60, 40, 255))
    found = np.asarray(decode(encoded(image, DISPLAY_P3), "#102030"))
    assert np.abs(found[0, 0] - p3_in_srgb(np.asarray(colours()))[0, 0]).max() <= 1.5
    assert (found[1:] == (0x10, 0x20, 0x30)).all()


@pytest.mark.parametrize("mode", ["P", "LA"])
def test_transparent_palettes_and_greys_are_converted(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (200, 60, 40, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    if mode == "P":
        data = encoded(image.quantize(4), DISPLAY_P3)
        expected = p3_in_srgb(np.array([[200, 60, 40]], np.uint8))[0]
    else:
        data = encoded(image.convert("LA"), SQUARE)
        grey = image.convert("L").getpixel((0, 0)) / 255
        expected = np.full(3, 255 * (1.055 * grey ** (2 / 2.4) - 0.055))
    found = np.asarray(decode(data, "#102030"))
    assert np.abs(found[0, 0] - expected).max() <= 2
    assert found[0, 1].tolist() == [0x10, 0x20, 0x30]


def test_grey_of_another_curve_comes_to_srgb() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = np.asarray(decode(encoded(Image.fromarray(values), SQUARE)))
    light = (values / 255.0) ** 2
    by_hand = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(found - by_hand[..., None]).max() <= 2
    assert np.abs(by_hand - values).max() > 5


def test_a_palette_is_converted() -> None:
    image = colours().quantize(16)
    found = np.asarray(decode(encoded(image, DISPLAY_P3)))
    assert np.abs(found - p3_in_srgb(np.asarray(image.convert("RGB")))).max() <= 1.5


def test_conditioning_images_are_data() -> None:
    assert decode_conditioning(encoded(colours(), DISPLAY_P3)).tobytes() == colours().tobytes()
