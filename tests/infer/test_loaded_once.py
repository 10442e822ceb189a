"""Several ControlNets draw with a base model that is loaded once, from prompts encoded once."""

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from transformers import T5EncoderModel

from infer.config import GenerateConfig, ScoreConfig
from infer.drawing.generate import generate
from infer.scoring.score import score
from tests.conftest import PROMPTS


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the models that are loaded, by class, and the texts that T5 encodes."""
    found: Counter[str] = Counter()

    def count_loads(model: type[Any]) -> None:
        load = model.from_pretrained.__func__

        def counted(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
            found[cls.__name__] += 1
            return load(cls, *args, **kwargs)

        monkeypatch.setattr(model, "from_pretrained", classmethod(counted))

    for model in (T5EncoderModel, SD3Transformer2DModel, SD3ControlNetModel):
        count_loads(model)
    forward = T5EncoderModel.forward

    @functools.wraps(forward)
    def encode(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        found["texts"] += len(input_ids)
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", encode)
    return found


def test_pictures_of_several_controlnets(
    base: Path, controlnet: Path, circles: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    images = tuple(circles / "source" / f"{number}.png" for number in range(2))
    config = GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),) * 3,
        output_dir=tmp_path / "out",
        prompt=PROMPTS,
        image=images,
        seed=(7, 8),
        num_inference_steps=1,
        device="cpu",
    )
    generate(config)
    assert len(list(config.output_dir.glob("00*.png"))) == 3 * 2 * 2
    # Both prompts, and the negative prompt.
    loads = {"T5EncoderModel": 1, "SD3Transformer2DModel": 1, "SD3ControlNetModel": 3}
    assert counts == loads | {"texts": 3}


def test_a_curve_over_checkpoints(
    base: Path, controlnet: Path, circles: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    config = ScoreConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),) * 2,
        output_dir=tmp_path / "score",
        source=circles,
        num_samples=3,
        batch_size=2,
        num_inference_steps=1,
        guidance_scale=1.0,
        device="cpu",
    )
    score(config)
    assert (config.output_dir / "curve.png").is_file()
    # Without guidance there is no negative prompt; the base alone draws from the same prompts.
    loads = {"T5EncoderModel": 1, "SD3Transformer2DModel": 1, "SD3ControlNetModel": 2}
    assert counts == loads | {"texts": 3}
