"""The moving average of weights: diffusers' formula, and what is saved of it."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from train.config import TrainConfig
from train.optim.ema import Ema
from train.run import train
from train.saving import checkpoints
from train.saving.controlnet import EMA_FOLDER


def walk(network: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_it_is_what_diffusers_averages(decay: float) -> None:
    network, generator = torch.nn.Linear(3, 4), torch.Generator().manual_seed(0)
    ours, theirs = Ema(network, decay), EMAModel(network.parameters(), decay=decay)
    for _ in range(30):
        walk(network, generator)
        ours.step()
        theirs.step(network.parameters())
        for mine, its in zip(ours.weights, theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, its)


class Calls(TorchDispatchMode):
    """Counts operations that average."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "lerp" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_all_weights_are_averaged_in_one_call() -> None:
    average = Ema(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5)), 0.9)
    with Calls() as calls:
        average.step()
    assert calls.count == 1


def test_averaged_weights_are_loaded_temporarily() -> None:
    network, generator = torch.nn.Linear(2, 2), torch.Generator().manual_seed(1)
    average = Ema(network, 0.9)
    average.step()
    before = network.weight.detach().clone()
    walk(network, generator)
    own = network.weight.detach().clone()
    with contextlib.suppress(KeyError), average.applied():
        assert torch.equal(network.weight, before)
        raise KeyError
    assert torch.equal(network.weight, own)


def test_it_is_saved_and_resumed(train_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(train_config, ema_decay=0.5)
    train(config)
    folder = config.output_dir / EMA_FOLDER
    average = SD3ControlNetModel.from_pretrained(folder).state_dict()
    own = SD3ControlNetModel.from_pretrained(config.output_dir).state_dict()
    assert any(not torch.equal(average[name], own[name]) for name in own)

    resumed = replace(config, output_dir=tmp_path / "resumed", resume_from_checkpoint="latest")
    resumed.output_dir.mkdir()
    (config.output_dir / "checkpoint-2").rename(resumed.output_dir / "checkpoint-2")
    assert checkpoints.read_state(resumed.output_dir / "checkpoint-2").averaged_steps == 2
    train(resumed)
    again = SD3ControlNetModel.from_pretrained(resumed.output_dir / EMA_FOLDER)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, average[name]), name


def test_by_hand(train_config: TrainConfig) -> None:
    # Weights after steps 1 and 2 are w1 and w2; the average is w1, then 2/11 w1 + 9/11 w2.
    config = replace(train_config, ema_decay=0.9, checkpointing_steps=1, max_train_steps=2)
    train(config)
    w1, w2, average = (
        SD3ControlNetModel.from_pretrained(config.output_dir / folder).state_dict()
        for folder in ("checkpoint-1/controlnet", "checkpoint-2/controlnet", "controlnet_ema")
    )
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, w1[name] * 2 / 11 + w2[name] * 9 / 11)


@pytest.mark.slow
def test_the_average_of_weights_in_bfloat16_is_saved_in_float32(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(
        train_config,
        mixed_precision="bf16",
        bf16_weights=True,
        ema_decay=0.9,
        checkpointing_steps=1,
        max_train_steps=2,
    )
    train(config)
    w1, w2, average, result = (
        load_file(config.output_dir / folder / "diffusion_pytorch_model.safetensors")
        for folder in (
            "checkpoint-1/controlnet",
            "checkpoint-2/controlnet",
            f"checkpoint-2/{EMA_FOLDER}",
            EMA_FOLDER,
        )
    )
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    for name, tensor in average.items():
        right = w1[name].double() * 2 / 11 + w2[name].double() * 9 / 11
        torch.testing.assert_close(tensor.double(), right, rtol=1e-6, atol=1e-9)
        assert torch.equal(tensor, result[name])
    # Whoever goes on from it goes on from these very numbers.
    resumed = replace(config, max_train_steps=3, resume_from_checkpoint="latest")
    whole = replace(config, max_train_steps=3, output_dir=tmp_path / "whole")
    train(resumed)
    train(whole)
    again, once = (
        load_file(one.output_dir / EMA_FOLDER / "diffusion_pytorch_model.safetensors")
        for one in (resumed, whole)
    )
    assert all(torch.equal(tensor, once[name]) for name, tensor in again.items())
