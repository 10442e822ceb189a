"""From image bytes to VAE input, as diffusers does it."""

import io

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from precompute.images import BadImage, decode, fit, to_pixels, to_uint8


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


def test_sixteen_bits_become_eight() -> None:
    values = np.arange(0, 1 << 16, 97, dtype=np.uint16)[: 25 * 25].reshape(25, 25) * 2
    pixels = np.array(decode(encoded(Image.fromarray(values))))
    assert np.array_equal(pixels, np.repeat((values // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_numbers_of_unknown_range_are_refused() -> None:
    with pytest.raises(BadImage, match="floating point numbers"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(BadImage, match="reach from -5 to 0, not 16 bit"):
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
    ],
)
def test_fit_resizes_the_shorter_side_and_crops_the_middle(
    size: tuple[int, int], resized: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = Image.effect_noise(size, 50).convert("RGB")
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    assert np.array_equal(np.array(fit(image, 64)), np.array(expected))


def test_pixels_equal_diffusers_own_preprocessing() -> None:
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    uint8 = to_uint8(image)[None]
    stock = VaeImageProcessor(vae_scale_factor=8).preprocess(image)
    assert torch.equal(to_pixels(uint8, "-1_1"), stock)
    unit = VaeImageProcessor(vae_scale_factor=8, do_normalize=False).preprocess(image)
    assert torch.equal(to_pixels(uint8, "0_1"), unit)
