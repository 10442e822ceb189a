"""Steps that are left out, by fp16's loss scale or with --on-nonfinite skip, move nothing."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from benchmarks.reference.runs import logged_losses
from common.errors import RunError
from tests.conftest import Spoil
from tests.train.precision import fp16_on_cpu
from tests.train.test_faults import infinite_gradient, plain_adamw
from tests.train.test_run import near_gradient_descent, same, weights
from train import assembly, loop
from train.config import TrainConfig
from train.optim.nonfinite import MOST_IN_A_ROW
from train.run import train
from train.saving import checkpoints
from train.saving.controlnet import EMA_FOLDER


@pytest.fixture
def config(train_config: TrainConfig) -> TrainConfig:
    """Every step's checkpoint, with an average, at a rate that rises by a tenth a step."""
    return replace(
        train_config,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=10,
        ema_decay=0.9,
        checkpointing_steps=1,
        on_nonfinite="skip",
    )


@pytest.fixture
def fp16(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """The same in fp16, where overflows are expected and the run is not told to go on."""
    fp16_on_cpu.allow(monkeypatch)
    return replace(config, mixed_precision="fp16", on_nonfinite="stop")


def rates(config: TrainConfig) -> list[float]:
    """Return the learning rate after each step, by the checkpoints."""
    files = [folder / "scheduler.bin" for folder in checkpoints.find(config.output_dir)]
    return [torch.load(file)["_last_lr"][0] for file in files]


def updates(config: TrainConfig, step: int) -> tuple[int, int]:
    """Return how many updates AdamW and the average have seen by a step."""
    folder = config.output_dir / f"checkpoint-{step}"
    state = torch.load(folder / "optimizer.bin")["state"]
    (count,) = {int(one["step"]) for one in state.values()}
    return count, checkpoints.read_state(folder).averaged_steps


def check_second_step_left_out(config: TrainConfig) -> None:
    one, two, three = (config.output_dir / f"checkpoint-{step}" for step in (1, 2, 3))
    assert same(one / "controlnet", two / "controlnet")
    assert same(one / EMA_FOLDER, two / EMA_FOLDER)
    assert not same(two / "controlnet", three / "controlnet")
    assert not same(two / EMA_FOLDER, three / EMA_FOLDER)
    assert rates(config) == pytest.approx([1e-4, 1e-4, 2e-4, 3e-4])
    assert [updates(config, step) for step in (1, 2, 3, 4)] == [(1, 1), (1, 1), (2, 2), (3, 3)]
    # Its samples are used up and its number is taken, as elsewhere in diffusers.
    state = checkpoints.read_state(two)
    assert (state.step, state.place) == (2, 4)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_moves_with_on_nonfinite_skip(
    fused: bool,
    config: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not fused:
        monkeypatch.setattr(assembly, "make_optimizer", plain_adamw)
    in_batch(2, infinite_gradient)
    train(config)
    check_second_step_left_out(config)


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_moves_when_fp16_overflows(
    fused: bool,
    fp16: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not fused:
        monkeypatch.setattr(assembly, "make_optimizer", plain_adamw)
    in_batch(2, infinite_gradient)
    train(fp16)
    check_second_step_left_out(fp16)
    scales = [
        torch.load(folder / "scaler.pt")["scale"] for folder in checkpoints.find(fp16.output_dir)
    ]
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**15]
    assert "1 steps were left out" in capsys.readouterr().out


def test_a_run_in_fp16_goes_on_after_an_overflow_to_the_same_bits(
    fp16: TrainConfig, in_batch: Callable[[int, Spoil], None], tmp_path: Path
) -> None:
    in_batch(2, infinite_gradient)
    train(fp16)
    resumed = replace(fp16, output_dir=tmp_path / "resumed", resume_from_checkpoint="latest")
    resumed.output_dir.mkdir()
    shutil.copytree(fp16.output_dir / "checkpoint-2", resumed.output_dir / "checkpoint-2")
    train(resumed)
    assert same(resumed.output_dir, fp16.output_dir)
    assert same(resumed.output_dir / EMA_FOLDER, fp16.output_dir / EMA_FOLDER)
    assert rates(resumed)[-1] == rates(fp16)[-1]


def test_fp16_trains_float32_weights_as_float32_does(
    train_config: TrainConfig, fp16: TrainConfig, tmp_path: Path
) -> None:
    exact = near_gradient_descent(
        replace(train_config, logging_steps=1, report_to="tensorboard", lr_scheduler="constant")
    )
    train(exact)
    AcceleratorState._reset_state(True)  # it settles a process's precision
    rounded = replace(exact, mixed_precision="fp16", output_dir=tmp_path / "rounded")
    train(rounded)
    assert {tensor.dtype for tensor in weights(rounded.output_dir).values()} == {torch.float32}
    # fp16 rounds by up to 2**-11; a loss is a mean over a thousand numbers, each rounded on a few
    # dozen ways.
    found, right = logged_losses(rounded.output_dir), logged_losses(exact.output_dir)
    assert found == pytest.approx(right, rel=2**-8)
    assert found != right


def spoil_all(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    original = loop.batch_losses

    def batch_losses(batch: Any, controlnet: Any, *others: Any) -> Tensor:
        return spoil(original(batch, controlnet, *others), controlnet)

    monkeypatch.setattr(loop, "batch_losses", batch_losses)


def test_a_run_that_only_leaves_steps_out_ends(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_all(monkeypatch, lambda losses, _: losses * math.nan)
    config = replace(config, checkpointing_steps=500, max_train_steps=100)
    with pytest.raises(
        RunError,
        match=rf"^step {MOST_IN_A_ROW}: the last {MOST_IN_A_ROW} steps were left out, since their "
        r"gradients were not finite\. Go on from a checkpoint before them\. A lower",
    ):
        train(config)
    assert not (config.output_dir / "config.json").exists()


def test_without_any_finite_loss_none_is_logged(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_all(monkeypatch, lambda losses, _: losses * math.nan)
    config = replace(config, logging_steps=2, report_to="tensorboard", checkpointing_steps=500)
    train(config)
    events = EventAccumulator(str(config.output_dir / "logs" / "train_controlnet"))
    events.Reload()
    assert [math.isnan(event.value) for event in events.Scalars("loss")] == [True, True]
    assert [event.value for event in events.Scalars("steps_left_out")] == [2, 4]
