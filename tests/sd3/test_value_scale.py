"""Scales of conditioning images: which numbers become black and white."""

import io

import numpy as np
import pytest
from PIL import Image

from sd3.image_files import BadImage
from sd3.images import decode_conditioning
from sd3.value_scale import Values, parse_scale, values_of

MILLIMETRES = np.array([[0, 1000, 2500, 5000]], np.uint16)
IDS = np.array([[0, 5, 10, 20]], np.uint8)


def grey(numbers: np.ndarray, scale: str, kind: str = "PNG") -> list[int]:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, kind)
    image = decode_conditioning(file.getvalue(), scale=scale)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return [int(value) for value in pixels[0, :, 0]]


@pytest.mark.parametrize(
    ("numbers", "scale", "expected"),
    [
        (MILLIMETRES, "as-is", [0, 3, 9, 19]),  # the upper 8 of 16 bits: divided by 256
        (MILLIMETRES, "auto", [0, 51, 128, 255]),
        (MILLIMETRES, "0:5000", [0, 51, 128, 255]),
        (MILLIMETRES, "1000:2000", [0, 0, 255, 255]),
        (MILLIMETRES, "0:10000", [0, 26, 64, 128]),
        (MILLIMETRES + 5000, "auto", [0, 51, 128, 255]),
        (np.full((1, 2), 700, np.uint16), "auto", [0, 0]),
        (IDS, "as-is", [0, 5, 10, 20]),
        (IDS, "auto", [0, 64, 128, 255]),
        (IDS, "0:20", [0, 64, 128, 255]),
    ],
)
def test_a_scale_says_what_becomes_black_and_white(
    numbers: np.ndarray, scale: str, expected: list[int]
) -> None:
    assert grey(numbers, scale) == expected


def test_floating_point_numbers_have_a_range_by_their_scale_alone() -> None:
    metres = np.array([[0.0, 1.0, 2.5, 5.0]], np.float32)
    assert grey(metres, "auto", "TIFF") == [0, 51, 128, 255]
    assert grey(metres, "0:10", "TIFF") == [0, 26, 64, 128]
    assert grey(np.array([[np.inf, 1]], np.float32), "0:2", "TIFF") == [255, 128]
    for numbers, scale in (([np.inf, 1], "auto"), ([np.nan, 1], "0:2")):
        with pytest.raises(BadImage, match="not finite"):
            grey(np.array([numbers], np.float32), scale, "TIFF")


def test_colours_are_stretched_alike() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[[10, 20, 30], [20, 20, 10]]], np.uint8)).save(file, "PNG")
    pixels = np.asarray(decode_conditioning(file.getvalue(), scale="auto"))
    assert pixels.tolist() == [[[0, 128, 255], [128, 128, 0]]]


def test_a_scale_for_larger_numbers_is_not_for_8_bit() -> None:
    with pytest.raises(BadImage, match="8 bit numbers, and the conditioning scale 0:5000 is"):
        grey(IDS, "0:5000")


@pytest.mark.parametrize("text", ["", "16bit", "5:5", "9:3", "1:", ":1", "0:inf", "nan:1"])
def test_what_is_no_scale_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_scale(text)


def test_values_tell_slivers_and_single_colours() -> None:
    assert values_of(Image.fromarray(MILLIMETRES)) == Values(0, 5000, 65535)
    assert values_of(Image.fromarray(MILLIMETRES)).is_sliver
    assert values_of(Image.new("I;16B", (2, 2), 7)) == Values(7, 7, 65535)
    assert values_of(Image.fromarray(IDS)).is_sliver
    # An eighth of 255 is 31.9.
    assert values_of(Image.fromarray(np.array([[100, 131]], np.uint8))).is_sliver
    assert not values_of(Image.fromarray(np.array([[100, 132]], np.uint8))).is_sliver
    flat = values_of(Image.new("RGB", (4, 4), (7, 7, 7)))
    assert (flat.is_one_colour, flat.is_sliver) == (True, False)
