"""Tests for a machine with a GPU; `make gpu` runs them.

With `GPU_TESTS_ON=cpu` they run on the CPU as far as they mean something there: those that use
`card` or `two_cards` do not.
"""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.presets import reset_accelerate
from train.config import TrainConfig
from train.memory import activation_offload
from train.optim import offloaded_state
from train.run import train


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What the tests run on."""
    name = os.environ.get("GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("no GPU here that torch sees; GPU_TESTS_ON=cpu runs these tests on the CPU")
    return torch.device(name)


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """Compute float32 products in float32; cuDNN's are in TF32 by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def card(device: torch.device) -> None:
    """Skip a test that means nothing without a GPU."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")


@pytest.fixture
def two_cards(card: None) -> None:
    """Skip a test that needs two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture(scope="session")
def plain(
    base: Path, cache: Path, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """Four steps in float32 near to gradient descent, whose rounding stays small; trained."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        cache=(str(cache),),
        output_dir=tmp_path_factory.mktemp("plain") / "out",
        num_controlnet_layers=2,
        train_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=2,
        max_grad_norm=0.0,
        # AdamW with an epsilon that drowns the second moment, which else makes a step of rounding.
        adam_epsilon=1.0,
        adam_weight_decay=0.0,
        learning_rate=0.1,
        lr_scheduler="constant",
        validation_steps=0,
        logging_steps=1,
        report_to="tensorboard",
        mixed_precision="no",
    )
    reset_accelerate()
    train(config)
    return config


@pytest.fixture
def small_tensors_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload the miniature's small tensors too."""
    monkeypatch.setattr(offloaded_state, "MIN_OFFLOADED_NUMBERS", 64)
    monkeypatch.setattr(activation_offload, "MIN_OFFLOADED_BYTES", 64)
