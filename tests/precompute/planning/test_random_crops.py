"""Where random crops lie: inside the picture, of the right shape, and drawn as they should be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from precompute.planning.views.random_crops import Box, RandomCrops, Size, cut
from sd3.image_files import BadImage

PICTURE = "0123456789abcdef0123456789abcdef"
SIDES = st.integers(16, 3000)
SHAPE_SIDES = st.integers(1, 24).map(lambda cells: 64 * cells)
SCALES = st.floats(0.05, 1)


def boxes(crops: RandomCrops, count: int, size: Size, shape: Size) -> list[Box]:
    return [crops.box(PICTURE, number, size, shape) for number in range(1, count + 1)]


@given(
    st.integers(0, 1 << 64 - 1),
    st.tuples(SCALES, SCALES),
    st.text("0123456789abcdef"),
    st.integers(1, 99),
    st.tuples(SIDES, SIDES),
    st.tuples(SHAPE_SIDES, SHAPE_SIDES),
)
def test_a_box_lies_in_the_picture_and_has_shape_and_scale(
    seed: int, scales: tuple[float, float], picture: str, number: int, size: Size, shape: Size
) -> None:
    least, most = sorted(scales)
    crops = RandomCrops(seed, least, most)
    left, top, right, bottom = crops.box(picture, number, size, shape)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    # The largest crop touches both borders of one side of the picture.
    largest = min(size[0] / shape[0], size[1] / shape[1])
    # Both sides are within half a pixel of those at one scale; none is below a pixel.
    low, high = least, most
    for side, to in ((right - left, shape[0]), (bottom - top, shape[1])):
        low = max(low, (side - 0.5) / (largest * to) if side > 1 else 0)
        high = min(high, (side + 0.5) / (largest * to))
    assert low <= high + 1e-9
    assert crops.box(picture, number, size, shape) == (left, top, right, bottom)


def test_scale_and_place_are_uniform_and_independent() -> None:
    count, size = 4000, (3000, 2000)
    found = np.array(boxes(RandomCrops(5, 0.5, 0.9), count, size, (64, 64)))
    sides = found[:, 2] - found[:, 0]
    scales = sides / 2000
    across = found[:, 0] / (3000 - sides)
    down = found[:, 1] / (2000 - sides)
    draws = np.stack([(scales - 0.5) / 0.4, across, down])
    # Kolmogorov-Smirnov at 0.001: 1.95 / sqrt(n).
    steps = np.arange(1, count + 1) / count
    for draw in draws:
        assert np.abs(np.sort(draw) - steps).max() < 1.95 / count**0.5
    # Three standard errors of a correlation.
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 3 / count**0.5


def test_each_crop_depends_on_seed_picture_and_number_alone() -> None:
    size, shape = (4000, 4000), (64, 64)
    crops = RandomCrops(1, 0.2, 0.9)
    one = crops.box(PICTURE, 1, size, shape)
    others = {
        crops.box(PICTURE, 2, size, shape),
        crops.box(PICTURE[::-1], 1, size, shape),
        RandomCrops(2, 0.2, 0.9).box(PICTURE, 1, size, shape),
    }
    assert len(others | {one}) == 4


def test_crops_of_other_settings_are_other_contents() -> None:
    settings = [
        RandomCrops(0, 0.5, 1.0),
        RandomCrops(1, 0.5, 1.0),
        RandomCrops(0, 0.4, 1.0),
        RandomCrops(0, 0.5, 0.9),
    ]
    bits = [each.bits(3) for each in settings]
    assert all(not each[0].any() for each in bits)
    assert len({tuple(row) for each in bits for row in each[1:].tolist()}) == 4 * 3
    # More crops leave the others what they are.
    assert np.array_equal(settings[0].bits(1), bits[0][:2])


def ramp(size: Size) -> Image.Image:
    """Red grows across and green down by the same share of the picture, whatever its size."""
    across, down = ((np.arange(side) + 0.5) / side * 255 for side in size)
    pixels = np.zeros((size[1], size[0], 3))
    pixels[..., 0], pixels[..., 1] = across, down[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("size", [(600, 400), (300, 200), (1500, 1000), (768, 512)])
def test_a_box_takes_the_same_part_of_images_of_any_size(size: Size) -> None:
    box, like = (90, 40, 390, 240), (600, 400)
    found = np.array(cut(ramp(size), box, (30, 20), like)).astype(float)
    # The middle of each of the 30 x 20 pixels lies here in the picture, as a share of its sides.
    across = (90 + (np.arange(30) + 0.5) * 10) / 600 * 255
    down = (40 + (np.arange(20) + 0.5) * 10) / 400 * 255
    assert np.abs(found[..., 0] - across).max() <= 1
    assert np.abs(found[..., 1] - down[:, None]).max() <= 1


def test_an_image_of_another_shape_is_refused_stretched_or_cut_about_its_centre() -> None:
    box, like = (0, 0, 100, 100), (200, 100)
    square = ramp((300, 300))
    with pytest.raises(BadImage, match="of another shape than its image's 200 x 100"):
        cut(square, box, (10, 10), like)
    stretched, cropped = (
        np.array(cut(square, box, (10, 10), like, way))[..., 1].mean() / 255
        for way in ("stretch", "crop")
    )
    # Stretched, the box is the left half, all of its height; cut, the quarter to three quarters.
    down = {
        way: np.array(cut(square, box, (10, 10), like, way))[:, 0, 1] / 255
        for way in ("stretch", "crop")
    }
    assert stretched == pytest.approx(0.5, abs=0.01)
    assert cropped == pytest.approx(0.5, abs=0.01)
    assert down["stretch"][[0, -1]] == pytest.approx([0.05, 0.95], abs=0.01)
    assert down["crop"][[0, -1]] == pytest.approx([0.275, 0.725], abs=0.01)
