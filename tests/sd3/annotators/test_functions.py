"""Annotators that are functions: their pixels are the libraries' own, call for call."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter, sobel

from common.errors import ConfigError
from sd3.annotators.registry import FUNCTIONS, find_annotator
from tests.sd3.annotators.conftest import picture_of


def drawn(name: str, image: Image.Image, *arguments: str) -> np.ndarray:
    function = find_annotator(name, arguments).function
    assert function is not None
    found = function(image)
    assert (found.mode, found.size) == ("RGB", image.size)
    return np.asarray(found)


def as_grey(pixels: np.ndarray) -> np.ndarray:
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def test_canny_is_opencvs(picture: Image.Image) -> None:
    for arguments, thresholds in (((), (100, 200)), (("low_threshold=20.5",), (20.5, 200))):
        expected = cv2.Canny(np.asarray(picture), *thresholds)
        assert 0 < expected.mean() < 255
        assert (as_grey(drawn("canny", picture, *arguments)) == expected).all()


def test_blur_grey_and_jpeg_are_pillows(picture: Image.Image) -> None:
    expected = picture.filter(ImageFilter.GaussianBlur(2.5))
    assert (drawn("blur", picture, "radius=2.5") == np.asarray(expected)).all()
    assert (as_grey(drawn("grey", picture)) == np.asarray(picture.convert("L"))).all()
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=7)
    assert (drawn("jpeg", picture, "quality=7") == np.asarray(Image.open(file))).all()


def test_superres_keeps_a_share_of_the_pixels(picture: Image.Image) -> None:
    small = picture.resize((24, 16), Image.Resampling.BICUBIC)
    expected = small.resize((96, 64), Image.Resampling.BICUBIC)
    assert (drawn("superres", picture, "factor=4") == np.asarray(expected)).all()
    assert (drawn("superres", picture, "factor=1") == np.asarray(picture)).all()


def test_softedge_is_the_gradients_size(picture: Image.Image) -> None:
    found = as_grey(drawn("softedge", picture, "sigma=2.0")).astype(float)
    smooth = gaussian_filter(np.asarray(picture.convert("L"), float), 2, mode="mirror")
    size = np.hypot(*(sobel(smooth, axis, mode="mirror") for axis in (0, 1)))
    expected = np.clip(size / np.quantile(size, 0.99), 0, 1) * 255
    assert np.abs(found - expected).max() <= 2  # OpenCV cuts the Gaussian off earlier than scipy
    assert found.max() == 255


def test_lineart_finds_dark_lines_and_no_light_ones() -> None:
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:, 16:18], pixels[:, 48:50] = 0, 255
    found = as_grey(drawn("lineart", Image.fromarray(pixels)))
    assert found[:, 16:18].min() == 255
    assert found[:, 48:50].max() == 0
    assert found[:, 30:34].max() == 0


@pytest.mark.parametrize("name", ["canny", "softedge", "lineart"])
def test_a_flat_picture_has_no_lines(name: str) -> None:
    assert drawn(name, Image.new("RGB", (32, 32), "orange")).max() == 0


def test_a_mask_covers_the_asked_for_share_and_leaves_the_rest(picture: Image.Image) -> None:
    shares = []
    for seed in range(20):
        pixels = drawn("mask", picture, "least=0.2", "most=0.4", "colour=#fe01fe", f"seed={seed}")
        covered = (pixels == (254, 1, 254)).all(axis=-1)
        assert (pixels[~covered] == np.asarray(picture)[~covered]).all()
        shares.append(covered.mean())
    assert min(shares) >= 0.2
    assert max(shares) <= 0.7  # the last stroke may go beyond
    assert max(shares) - min(shares) > 0.05


def test_a_mask_is_the_same_for_the_same_pixels_alone(picture: Image.Image) -> None:
    once, again = (drawn("mask", picture) for _ in range(2))
    assert (once == again).all()
    other = picture.copy()
    other.putpixel((0, 0), (1, 2, 3))
    assert (drawn("mask", other) != once).any(axis=-1).mean() > 0.05
    assert (drawn("mask", picture, "seed=1") != once).any(axis=-1).mean() > 0.05


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_smallest_picture_can_be_drawn_from(name: str) -> None:
    assert drawn(name, picture_of(0, (16, 16))).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("canny", "low=50", "low=50: unknown to canny. Known: high_threshold, low_threshold."),
        ("grey", "radius=1", "unknown to grey. It takes none."),
        ("blur", "radius=wide", "--conditioning-args radius=wide: blur expects float."),
        ("jpeg", "quality=true", "quality=True: jpeg expects int."),
        ("jpeg", "quality=900", "quality=900: jpeg fails (quality must be in 1 to 95)."),
        ("softedge", "sigma=0", "sigma=0: softedge fails (sigma must be above 0)."),
        ("lineart", "sigma=-1", "sigma=-1: lineart fails (sigma must be above 0)."),
        ("blur", "radius=-1", "blur fails (radius must be at least 0)."),
        ("mask", "colour=nocolour", "colour=nocolour: mask fails (unknown color specifier"),
        ("canny", "low_threshold", "low_threshold: expected key=value, for instance radius=4."),
        ("blur", "radius=nan", "radius=nan: expected a finite number."),
    ],
)
def test_a_wrong_argument_is_one_line(name: str, argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_annotator(name, [argument])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_argument_is_given_once() -> None:
    with pytest.raises(ConfigError, match="--conditioning-args radius=3: radius is given twice"):
        find_annotator("blur", ["radius=2", "radius=3"])


def test_arguments_count_by_their_value() -> None:
    def identity(name: str, *arguments: str) -> list[str]:
        return find_annotator(name, arguments).identity

    assert identity("canny") == ["canny", "100 200"]  # as caches of former versions have it
    assert identity("canny", "low_threshold=100") == identity("canny")
    assert identity("canny", "low_threshold=50") == ["canny", "50 200"]
    assert identity("blur", "radius=8") == identity("blur")
    assert identity("blur", "radius=9") != identity("blur")
    assert identity("mask", "seed=1") != identity("mask")


def test_defaults_are_recorded_too() -> None:
    found = find_annotator("canny", ["low_threshold=50"])
    assert found.arguments == {"low_threshold": 50, "high_threshold": 200}
    assert find_annotator("canny", found.arguments).identity == found.identity
