"""Tests for a machine with a GPU; `make gpu` runs them.

With `GPU_TESTS_ON=cpu` they run on the CPU as far as they mean something there: those that use
`card` or `two_cards` do not.
"""

import os
from dataclasses import replace

import pytest
import torch

from train.config import TrainConfig
from train.memory import activation_offload
from train.optim import offloaded_state


@pytest.fixture(scope="session")
def device() -> torch.device:
    """What the tests run on."""
    name = os.environ.get("GPU_TESTS_ON", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("no GPU here that torch sees; GPU_TESTS_ON=cpu runs these tests on the CPU")
    return torch.device(name)


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


@pytest.fixture
def plain(train_config: TrainConfig, device: torch.device) -> TrainConfig:
    """Four steps in float32 near to gradient descent, whose rounding stays small; every loss."""
    return replace(
        train_config,
        max_grad_norm=0.0,
        adam_epsilon=1.0,
        adam_weight_decay=0.0,
        learning_rate=0.1,
        lr_scheduler="constant",
        logging_steps=1,
        report_to="tensorboard",
    )


@pytest.fixture
def small_tensors_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload the miniature's small tensors too."""
    monkeypatch.setattr(offloaded_state, "MIN_OFFLOADED_NUMBERS", 64)
    monkeypatch.setattr(activation_offload, "MIN_OFFLOADED_BYTES", 64)
