"""--keep-best: the ControlNet of the lowest held-out loss, as its checkpoint has it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file

from common.errors import ConfigError
from tests.conftest import train_in_two_processes
from train.config import TrainConfig
from train.run import train
from train.saving.best import Best, lowest, read_best
from train.saving.publish import _patterns

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(train_config: TrainConfig, held_out: Path) -> TrainConfig:
    """Four steps, each with a checkpoint and a validation without pictures."""
    return replace(
        train_config,
        cache=(str(held_out),),
        keep_best=True,
        checkpointing_steps=1,
        validation_steps=1,
        num_validation_images=1,
        validation_inference_steps=1,
    )


def script(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Have the measurements give these losses, in order."""
    left: Iterator[float] = iter(losses)
    monkeypatch.setattr("train.validation.pictures.held_out_loss", lambda *_: [next(left), 0.0] * 4)


def assert_kept(output_dir: Path, step: int, folder: str = "controlnet") -> None:
    best, checkpoint = output_dir / "best", output_dir / f"checkpoint-{step}" / folder
    torch.testing.assert_close(
        load_file(best / WEIGHTS), load_file(checkpoint / WEIGHTS), rtol=0, atol=0
    )
    SD3ControlNetModel.from_pretrained(best)
    assert json.loads((best / "best.json").read_text())["step"] == step


def test_it_is_that_of_the_lowest_loss(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 1.0, 4.0, 2.0, 3.0, 2.5)  # before the first step, and after each
    train(config)
    assert_kept(config.output_dir, 2)
    assert read_best(config.output_dir) == Best(2, 1.0, averaged=False)  # of 2.0 and 0.0
    card = " ".join((config.output_dir / "README.md").read_text().split())
    assert "lowest at step 2, 1.0000; the weights of that step are in `best/`" in card


def test_a_run_that_goes_on_knows_what_is_kept(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 1.0, 4.0, 2.0)
    train(replace(config, max_train_steps=2))
    script(monkeypatch, 3.0, 2.5)
    train(replace(config, resume_from_checkpoint="latest"))
    assert_kept(config.output_dir, 2)
    # From an earlier step on it is another run: what came later in the former one does not count.
    for later in (2, 3, 4):
        shutil.rmtree(config.output_dir / f"checkpoint-{later}")
    script(monkeypatch, 3.0, 2.5, 2.9)
    train(replace(config, resume_from_checkpoint="latest"))
    assert_kept(config.output_dir, 3)


def test_a_run_that_was_killed_before_it_kept_its_best_keeps_it_on_resuming(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, 1.0, 4.0, 2.0)
    train(replace(config, max_train_steps=2))
    shutil.rmtree(config.output_dir / "best")  # as if it were killed after the validation
    script(monkeypatch, 3.0, 2.5)
    train(replace(config, resume_from_checkpoint="latest"))
    assert_kept(config.output_dir, 2)
    assert read_best(config.output_dir) == Best(2, 1.0, averaged=False)


def test_the_average_is_kept_where_it_is_better(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the first step once, then of the weights and of their average.
    script(monkeypatch, 1.0, 4.0, 3.0, 5.0, 2.0, 5.0, 6.0, 7.0, 8.0)
    train(replace(config, ema_decay=0.5))
    assert_kept(config.output_dir, 2, "controlnet_ema")
    assert read_best(config.output_dir) == Best(2, 1.0, averaged=True)


def test_a_new_run_drops_what_an_earlier_one_kept(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = config.output_dir / "best"
    stale.mkdir(parents=True)
    (stale / "best.json").write_text('{"step": 1, "held_out_loss": 0.0, "averaged": false}')
    script(monkeypatch, 1.0, 4.0)
    train(replace(config, max_train_steps=1))
    assert read_best(config.output_dir) == Best(1, 2.0, averaged=False)


def test_without_a_held_out_loss_it_is_refused(
    config: TrainConfig, train_config: TrainConfig
) -> None:
    for wrong in (replace(config, cache=train_config.cache), replace(config, validation_steps=0)):
        with pytest.raises(ConfigError, match=r"^--keep-best: there is no held-out loss to choose"):
            train(wrong)


def test_the_mean_over_the_levels_decides() -> None:
    losses = {"held_out_loss": [0.0, 4.0], "ema_held_out_loss": [1.5, 1.5]}
    assert lowest(7, losses) == Best(7, 1.5, averaged=True)


@pytest.mark.slow
def test_two_processes_keep_the_same(config: TrainConfig, tmp_path: Path) -> None:
    """The losses are measured, not given: the same in both, as one process measures them."""
    train(replace(config, train_batch_size=2))
    two = replace(config, train_batch_size=1, output_dir=tmp_path / "two")
    train_in_two_processes(two)
    one: Any = read_best(config.output_dir)
    other: Any = read_best(two.output_dir)
    assert other.step == one.step
    assert other.held_out_loss == pytest.approx(one.held_out_loss, rel=1e-5)
    assert_kept(two.output_dir, other.step)


def test_it_is_uploaded_with_the_last_one(config: TrainConfig) -> None:
    (config.output_dir / "best").mkdir(parents=True)
    expected = {"best/config.json", "best/diffusion_pytorch_model*"}
    assert expected <= set(_patterns(config))
    assert not expected & set(_patterns(replace(config, keep_best=False)))
