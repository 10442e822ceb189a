"""Stage 2 on the second of two GPUs: every tensor is there, and offloading changes no bit."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.devices import stand_in
from train.config import TrainConfig
from train.memory import activation_offload
from train.optim import offloaded_state
from train.run import train


@pytest.fixture(autouse=True)
def on_the_second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on cuda:1, and let nothing happen on cuda:0."""
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    with stand_in.only("cuda:1"):
        yield


@pytest.fixture
def config(train_config: TrainConfig) -> TrainConfig:
    return replace(train_config, mixed_precision="bf16", max_train_steps=2)


def trained(config: TrainConfig, folder: Path) -> dict[str, Tensor]:
    """Train in a folder and return the ControlNet's weights."""
    train(replace(config, output_dir=folder))
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"mixed_precision": "no"},
    "fp16": {"mixed_precision": "fp16"},
    "accumulation": {"gradient_accumulation_steps": 2},
    "int8": {"quantize_base": "int8"},
    "fp8": {"quantize_base": "fp8"},
    "nf4": {"quantize_base": "nf4", "max_train_steps": 1},
    "8bit-adam": {"optimizer": "adamw8bit", "max_train_steps": 1},
    "base-nf4": {"offload_base": 3, "quantize_base": "nf4", "max_train_steps": 1},
    "lean": {
        "max_grad_norm": 0.0,
        "fused_backward_pass": True,
        "bf16_weights": True,
        "offload_optimizer": True,
        "offload_activations": True,
        "checkpointing": "full",
        "ema_decay": 0.9,
    },
}


@pytest.fixture
def offload_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload whatever can be, however small."""
    monkeypatch.setattr(offloaded_state, "MIN_OFFLOADED_NUMBERS", 1)
    monkeypatch.setattr(activation_offload, "MIN_OFFLOADED_BYTES", 1)


@pytest.mark.usefixtures("offload_all")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_with(options: dict[str, Any], config: TrainConfig, tmp_path: Path) -> None:
    weights = trained(replace(config, **options), tmp_path / "out")
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


@pytest.mark.parametrize("decode", ["device", "cpu"])
def test_validation(decode: Any, config: TrainConfig, held_out: Path) -> None:
    train(
        replace(
            config,
            cache=(str(held_out),),
            max_train_steps=1,
            ema_decay=0.9,
            validation_steps=1,
            validation_decode=decode,
            num_validation_images=1,
            validation_inference_steps=2,
        )
    )
    found = {path.name for path in config.output_dir.glob("validation/step-000001/*")}
    assert found == {"held_out.json"} | {
        f"{number}{ema}.png" for number in (0, 1) for ema in ("", "-ema")
    }


@pytest.mark.usefixtures("offload_all")
def test_offloading_changes_no_bit_and_is_saved_as_it_is_after_its_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, lr_scheduler="constant", checkpointing_steps=1)
    plain = trained(config, tmp_path / "plain")
    activations = trained(replace(config, offload_activations=True), tmp_path / "activations")
    assert equal(plain, activations)
    for more in ({}, {"checkpointing": "full", "offload_activations": True}):
        base = trained(replace(config, offload_base=4, **more), tmp_path / f"base{len(more)}")
        assert equal(plain, base)
    offloaded = replace(config, offload_optimizer=True)
    assert equal(plain, trained(offloaded, tmp_path / "state"))
    trained(replace(offloaded, max_train_steps=1), tmp_path / "parts")
    resumed = replace(offloaded, resume_from_checkpoint="latest")
    assert equal(plain, trained(resumed, tmp_path / "parts"))
