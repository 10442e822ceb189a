"""Annotators of controlnet-aux, with a double of the package: its calls, weights and errors."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import ConfigError
from sd3.annotators.drawing import Drawing
from sd3.annotators.registry import find_annotator
from tests.sd3.annotators.conftest import DoubleDetector, picture_of


def pixels_of(image: object) -> np.ndarray:
    assert isinstance(image, Image.Image)
    return np.asarray(image)


def test_pixels_are_those_of_the_packages_own_call(
    controlnet_aux: Path, picture: Image.Image
) -> None:
    weights = f"pretrained_model_or_path={controlnet_aux}"
    detector = DoubleDetector.from_pretrained(str(controlnet_aux))
    for name, scribble in (("DoubleDetector", False), ("scribble_double", True)):
        annotator = find_annotator(name, [weights])
        (found,) = Drawing(annotator, "cpu").draw([picture])
        expected = detector(picture, image_resolution=64, scribble=scribble).convert("RGB")
        assert (pixels_of(found) == np.asarray(expected)).all()
    given = find_annotator("DoubleDetector", [weights, "image_resolution=128"])
    (found,) = Drawing(given, "cpu").draw([picture])
    assert pixels_of(found).shape == (64, 96, 3)  # in the picture's size all the same


def test_weights_count_and_the_name_of_their_file_does_not(controlnet_aux: Path) -> None:
    def identity(*arguments: str) -> list[str]:
        weights = f"pretrained_model_or_path={controlnet_aux}"
        return find_annotator("DoubleDetector", [weights, *arguments]).identity

    (controlnet_aux / "copy.pth").write_bytes((controlnet_aux / "weights.pth").read_bytes())
    torch.save(torch.nn.Linear(1, 1).state_dict(), controlnet_aux / "other.pth")
    (controlnet_aux / "deep").mkdir()
    (controlnet_aux / "deep" / "w.pth").write_bytes((controlnet_aux / "weights.pth").read_bytes())
    assert identity("filename=copy.pth") == identity()
    assert identity("subfolder=deep", "filename=w.pth") == identity()
    assert identity("filename=other.pth") != identity()
    assert identity("scribble=true") != identity()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scribble_doubel", [], "unknown. Did you mean 'scribble_double'?"),
        ("cany", [], "--conditioning-from cany: unknown. Did you mean 'canny'?"),
        ("DoubleDetector", ["pretrained_model_or_path=nowhere"], "cannot be loaded (no weights at"),
        ("DoubleDetector", ["scribbel=true"], "scribbel=True: unknown to DoubleDetector. Known:"),
        ("DoubleDetector", ["scribble=3"], "scribble=3: DoubleDetector expects bool."),
    ],
)
def test_what_is_wrong_is_one_line(
    controlnet_aux: Path, name: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        find_annotator(name, arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_random_is_seeded_by_the_picture(
    controlnet_aux: Path, picture: Image.Image
) -> None:
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), np.random.get_state()[1]
    other = picture_of(9)
    images = [picture, other, picture, other]
    drawn = [pixels_of(one) for one in Drawing(find_annotator("shuffle"), "cpu").draw(images)]
    assert (drawn[0] == drawn[2]).all()
    assert (drawn[1] == drawn[3]).all()
    # The rows of both stand in different orders.
    orders = [
        [list(map(bytes, np.asarray(image))).index(bytes(row)) for row in found]
        for image, found in zip(images[:2], drawn[:2], strict=True)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(picture.height))
    assert orders[0] != orders[1]
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()


def test_without_the_package_a_line_says_what_there_is() -> None:
    with pytest.raises(ConfigError) as raised:
        find_annotator("softedge_hed")
    assert "none of canny, softedge, lineart, blur" in str(raised.value)
    assert "pip install '.[controlnet-aux]'" in str(raised.value)
