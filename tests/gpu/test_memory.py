"""`--estimate` beside what the device's allocator says."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bases import TRANSFORMERS
from benchmarks.random_weights import save_transformer
from benchmarks.timed_steps import time_steps
from benchmarks.train_step import TINY, Row, prepare_config
from train.memory import simulation
from train.memory.estimate import find_sizes

pytestmark = pytest.mark.gpu
SETTINGS: list[dict[str, Any]] = [
    {},
    {"checkpointing": "full"},
    {"offload_optimizer": True},
    {"offload_base": 3},
    {"quantize_base": "int8", "bf16_weights": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=" and ".join)
def test_an_estimate_is_what_a_step_takes(
    settings: dict[str, Any],
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Four of SD3's own blocks: what CUDA's libraries keep for themselves is small beside them.
    transformer, px = TRANSFORMERS["sd3-medium"] | {"num_layers": 4}, 512
    if device.type == "cpu":
        transformer, px = TINY, 256
    save_transformer(tmp_path / "base", transformer)
    gc.collect()  # of what earlier tests left
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    config = prepare_config(Row("", px, settings), tmp_path, transformer)
    estimated = sum(simulation.simulate(config, find_sizes(config)).step.values())
    _, measured = time_steps(config, 0.01)
    assert estimated == pytest.approx(measured - before, rel=0.1)
