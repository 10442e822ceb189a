"""Discs are found where they were drawn, and measured as geometry and colorimetry say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from demo.circles import Circle, draw_disc, draw_outline
from demo.colors import COLORS
from infer.scoring.discs import (
    LEAST_CONTRAST,
    caption_colors,
    color_difference,
    find_disc,
    find_patch,
    measure_disc,
    outlined_disc,
)
from sd3.images import fit

SIDE = 128
FLAT = np.full((SIDE, SIDE, 3), 200, np.uint8)


def small(image: Image.Image) -> Image.Image:
    return fit(image, SIDE)


def lens(radius: float, shift: float) -> float:
    """IoU of two circles of a radius whose centres are `shift` apart."""
    half = radius**2 * math.acos(shift / (2 * radius)) * 2
    overlap = half - shift / 2 * math.sqrt(4 * radius**2 - shift**2)
    return overlap / (2 * math.pi * radius**2 - overlap)


@settings(max_examples=40, deadline=None)
@given(
    radius=st.integers(60, 200),
    across=st.floats(0, 1),
    down=st.floats(0, 1),
    names=st.lists(st.sampled_from(sorted(COLORS)), min_size=2, max_size=2, unique=True),
)
def test_a_drawn_disc_is_found(radius: int, across: float, down: float, names: list[str]) -> None:
    color, background = names
    if color_difference(COLORS[color], COLORS[background]) < 2 * LEAST_CONTRAST:
        return  # one cannot be told from the other
    free = 512 - 2 * radius
    circle = Circle(radius + int(across * free), radius + int(down * free), radius, *names)
    found = measure_disc(
        small(draw_disc(circle)), small(draw_outline(circle)), COLORS[color], COLORS[background]
    )
    # Two rasters of one circle may differ by half a pixel of its radius.
    radius_px = radius * SIDE / 512
    assert found.iou > ((radius_px - 0.5) / radius_px) ** 2
    assert found.color_error == pytest.approx(0, abs=0.5)
    assert found.background_error == pytest.approx(0, abs=0.5)


def test_exact_discs_score_above_98_per_cent_on_average() -> None:
    from demo.circles import random_circles

    scores = [
        measure_disc(
            small(draw_disc(c)), small(draw_outline(c)), COLORS[c.color], COLORS[c.background]
        ).iou
        for c in random_circles(60, seed=9)
        if color_difference(COLORS[c.color], COLORS[c.background]) > 5
    ]
    assert np.mean(scores) > 0.98


def test_fringes_and_hairlines_are_no_part_of_a_disc() -> None:
    """As a decoder leaves them: a rim of a third colour, and threads that hang on to the disc."""
    circle = Circle(256, 256, 120, "burly wood", "bisque")
    pixels = np.array(small(draw_disc(circle)))
    rows, columns = np.ogrid[:SIDE, :SIDE]
    away = np.hypot(rows + 0.5 - 64, columns + 0.5 - 64)
    right = np.broadcast_to(columns > 64, away.shape)
    pixels[(away > 31) & (away < 38) & right] = (255, 240, 245)  # pinker than bisque is
    pixels[64, 90:120] = COLORS["burly wood"]
    found = measure_disc(
        Image.fromarray(pixels), small(draw_outline(circle)), COLORS[circle.color], COLORS["bisque"]
    )
    assert found.iou > 0.95
    assert found.color_error == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("shift", [16, 64, 128])
def test_a_shifted_disc_scores_what_geometry_gives(shift: int) -> None:
    drawn = Circle(200 + shift, 256, 120, "tomato", "old lace")
    wanted = Circle(200, 256, 120, "tomato", "old lace")
    found = measure_disc(
        small(draw_disc(drawn)), small(draw_outline(wanted)), COLORS["tomato"], COLORS["old lace"]
    )
    assert found.iou == pytest.approx(lens(120, shift), abs=0.03)


def test_wrong_colours_score_what_colorimetry_gives() -> None:
    drawn = Circle(256, 256, 100, "tomato", "old lace")
    found = measure_disc(
        small(draw_disc(drawn)), small(draw_outline(drawn)), COLORS["royal blue"], COLORS["white"]
    )
    expected = color_difference(COLORS["tomato"], COLORS["royal blue"])
    assert found.color_error == pytest.approx(expected, abs=0.5)
    background = color_difference(COLORS["old lace"], COLORS["white"])
    assert found.background_error == pytest.approx(background, abs=0.5)


def test_differences_are_those_of_the_standard() -> None:
    # L* of sRGB black, white and middle grey: 0, 100 and 53.585; CIEDE2000 of black and white: 100.
    assert color_difference((0, 0, 0), (255, 255, 255)) == pytest.approx(100, abs=0.01)
    assert color_difference((10, 20, 30), (10, 20, 30)) == 0


@pytest.mark.parametrize("kind", ["flat", "noise", "gradient", "stripe", "square frame"])
def test_pictures_without_a_disc_score_nothing(kind: str) -> None:
    pixels = FLAT.copy()
    if kind == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, FLAT.shape).astype(np.uint8)
    elif kind == "gradient":
        pixels[:] = np.linspace(0, 255, SIDE)[None, :, None]
    elif kind == "stripe":
        pixels[60:70] = 0
    elif kind == "square frame":
        pixels[30:90, 30:90] = 0
        pixels[40:80, 40:80] = 200
    assert find_disc(pixels) is None
    wanted = small(draw_outline(Circle(256, 256, 100, "red", "blue")))
    found = measure_disc(Image.fromarray(pixels), wanted, (255, 0, 0), (0, 0, 255))
    assert found.iou == 0
    assert found.color_error is None


def test_the_disc_of_an_outline() -> None:
    circle = Circle(300, 200, 101, "red", "blue")
    mask = outlined_disc(small(draw_outline(circle)))
    assert mask.sum() == pytest.approx(math.pi * (101 / 4) ** 2, rel=0.03)
    rows, columns = np.nonzero(mask)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((75, 50), abs=0.3)
    with pytest.raises(ValueError, match="no outline"):
        outlined_disc(Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("kind", ["disc", "line", "noise", "half plane"])
def test_what_is_no_circles_outline_is_refused(kind: str) -> None:
    light = np.zeros((SIDE, SIDE), np.uint8)
    rows, columns = np.ogrid[:SIDE, :SIDE]
    if kind == "disc":
        light[np.hypot(rows - 64, columns - 64) < 40] = 255
    elif kind == "line":
        light[64] = 255
    elif kind == "noise":
        light[:] = np.random.default_rng(0).integers(0, 256, light.shape)
    else:
        light[:40] = 255
    with pytest.raises(ValueError, match="not a circle's outline"):
        outlined_disc(Image.fromarray(light))


def test_a_patch_need_not_be_round() -> None:
    pixels = FLAT.copy()
    pixels[30:50, 20:100] = COLORS["tomato"]
    assert find_disc(pixels) is None
    patch = find_patch(pixels)
    assert patch is not None
    assert patch.color.tolist() == list(COLORS["tomato"])
    assert np.count_nonzero(patch.mask) == pytest.approx(20 * 80, abs=4)  # but for the corners
    assert find_patch(FLAT) is None


def test_captions_name_colours() -> None:
    assert caption_colors("pale golden rod circle with old lace background") == (
        (238, 232, 170),
        (253, 245, 230),
    )
    for wrong in ("a dog", "tomatoe circle with red background"):
        with pytest.raises(ValueError, match=r"not a caption|unknown color"):
            caption_colors(wrong)
