"""Depth: transformers' own pixels, the same bytes in any batch, and which model is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTModel, pipeline

from common.errors import ConfigError
from sd3.annotators.drawing import Drawing
from sd3.annotators.registry import find_annotator
from tests.depth_model import save_depth_model
from tests.sd3.annotators.conftest import picture_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_model(tmp_path_factory.mktemp("depth") / "model")


def draw(images: list[Image.Image], *arguments: str) -> list[bytes]:
    annotator = find_annotator("depth", arguments)
    assert annotator.in_batches
    found = Drawing(annotator, "cpu").draw(images)
    assert all(isinstance(one, Image.Image) for one in found)
    return [one.tobytes() for one in found if isinstance(one, Image.Image)]


def test_pixels_are_those_of_transformers_pipeline(model: Path) -> None:
    images = [picture_of(seed) for seed in range(3)]
    stock = pipeline("depth-estimation", model=str(model), device="cpu")
    expected = [stock(image)["depth"] for image in images]
    assert all(np.asarray(one).std() > 10 for one in expected)
    found = draw(images, f"model={model}")
    assert found == [one.convert("RGB").tobytes() for one in expected]
    inverted = draw(images, f"model={model}", "invert=true")
    assert inverted == [bytes(255 - value for value in one) for one in found]


def test_batches_of_one_and_of_eight_give_the_same_bytes(model: Path) -> None:
    images = [picture_of(seed) for seed in range(8)]
    alone = [byte for image in images for byte in draw([image], f"model={model}")]
    assert len(set(alone)) == 8
    assert draw(images, f"model={model}") == alone


def test_weights_count_and_the_models_name_does_not(model: Path, tmp_path: Path) -> None:
    found = find_annotator("depth", [f"model={model}"])
    other = find_annotator("depth", [f"model={save_depth_model(tmp_path / 'same')}"])
    assert found.identity == other.identity
    assert (found.models, other.models) == ([model], [tmp_path / "same"])
    assert find_annotator("depth", [f"model={model}", "invert=true"]).identity != found.identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=nowhere"], "model=nowhere: no such folder, and not a hub id (owner/name)."),
        (["model=empty"], "model=empty: no model in it; a config.json and weights as"),
        (["model=vit"], "model=vit: estimates no depth, it is of type 'vit'."),
        (["size=3"], "--conditioning-args size=3: unknown to depth. Known: invert, model, revis"),
    ],
)
def test_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError) as raised:
        find_annotator("depth", arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_flat_depth_is_black() -> None:
    from sd3.annotators.depth import _to_image

    assert np.asarray(_to_image(np.full((4, 4), 2.5, np.float32), False)).max() == 0
