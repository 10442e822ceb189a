"""How many blocks `--compile` compiles, with everything that changes how they are computed."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from infer.config import GenerateConfig
from infer.drawing.generate import generate
from tests.conftest import PROMPTS
from train.config import TrainConfig
from train.run import train
from train.validation import pictures

# Of the base: blocks whose streams need no gradient, whose pictures' alone does, and whose both do;
# and the last one, which drops the text. Of the ControlNet: its last one, whose text is frozen, and
# the others.
MOST_TRAINING = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "controlnet": {"checkpointing": "controlnet", "offload_activations": True},
    "full": {"checkpointing": "full"},
    "int8": {"checkpointing": "full", "quantize_base": "int8"},
    "fp8": {"quantize_base": "fp8"},
    "bfloat16": {"mixed_precision": "bf16", "bf16_weights": True, "offload_optimizer": True},
}


@pytest.fixture(autouse=True)
def only_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace blocks as `--compile` does, and compute them as they are."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def compiled() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(settings, id=name) for name, settings in SETTINGS.items()),
        pytest.param({"quantize_base": "nf4"}, id="nf4", marks=pytest.mark.extras),
    ],
)
def test_a_run_compiles_few_blocks_and_its_validations_none(
    settings: dict[str, Any],
    train_config: TrainConfig,
    held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validate, by_validation = pictures.validate, []

    def counted(*args: Any) -> None:
        before = compiled()
        validate(*args)
        by_validation.append(compiled() - before)

    monkeypatch.setattr(pictures, "validate", counted)
    train(
        replace(
            train_config,
            cache=(str(held_out),),
            compile=True,
            ema_decay=0.9,
            validation_steps=2,
            num_validation_images=1,
            validation_inference_steps=2,
            **settings,
        )
    )
    assert by_validation == [0, 0, 0]  # before training, and after the steps 2 and 4
    assert 0 < compiled() <= MOST_TRAINING
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_further_controlnets_are_not_compiled_anew(
    kind: Any, base: Path, controlnet: Path, circles: Path, tmp_path: Path
) -> None:
    counts = []
    for number in (1, 3):
        torch._dynamo.reset()
        counters.clear()
        generate(
            GenerateConfig(
                pretrained_model_name_or_path=str(base),
                controlnet=(str(controlnet),) * number,
                output_dir=tmp_path / str(number),
                prompt=PROMPTS[:1],
                image=(circles / "source" / "0.png",),
                num_inference_steps=2,
                quantize_base=kind,
                compile=True,
                device="cpu",
            )
        )
        counts.append(compiled())
    assert counts[0] == counts[1] > 0
