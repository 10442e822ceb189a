"""A base and a cache large enough that memory can be told apart."""

from pathlib import Path

import pytest

from benchmarks.synthetic import Shape, write_cache
from demo.base_model.pipeline import build_pipeline, save_base
from train.config import TrainConfig


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose activations weigh as much as its weights, and a cache for it."""
    folder = tmp_path_factory.mktemp("wide")
    save_base(
        folder / "base",
        build_pipeline(0, num_layers=6, num_attention_heads=4, attention_head_dim=32),
    )
    shape = Shape(side=32, tokens=24, clip_width=80, t5_width=96, pooled_width=80)
    write_cache(folder / "cache", shape, 2, 4)
    return folder / "base", folder / "cache"


@pytest.fixture
def config(wide: tuple[Path, Path], tmp_path: Path) -> TrainConfig:
    base, cache = wide
    return TrainConfig(
        pretrained_model_name_or_path=str(base),
        cache=(str(cache),),
        output_dir=tmp_path / "out",
        train_batch_size=2,
        max_grad_norm=0.0,
        validation_steps=0,
        report_to="none",
    )
