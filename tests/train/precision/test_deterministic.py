"""--deterministic: what it sets, and that it changes nothing on CPUs."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Spoil
from tests.train.test_run import same
from train.config import TrainConfig
from train.run import train


def test_it_asks_torch_for_the_same_bits(
    train_config: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    seen: list[tuple[bool, bool, str | None]] = []

    def note(losses: Tensor, _: Any) -> Tensor:
        # Where torch would only warn, attention on GPUs keeps its unordered backward pass.
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        return losses

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "so that it is restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    config = replace(train_config, max_train_steps=2)
    repeatable = replace(config, deterministic=True, output_dir=tmp_path / "repeatable")
    in_batch(1, note)
    train(config)
    in_batch(1, note)
    train(repeatable)
    # A number that cuBLAS takes; torch refuses others when a product is computed.
    assert seen == [(False, False, None), (True, False, ":4096:8")]
    assert not torch.backends.cudnn.benchmark
    assert same(config.output_dir, repeatable.output_dir)
    train(replace(config, output_dir=tmp_path / "again"))
    assert not torch.are_deterministic_algorithms_enabled()
