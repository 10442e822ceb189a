"""Gradients that are not finite, signals, and disks that are full."""

import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import RunError
from tests.conftest import Outcome, Spoil, flags
from tests.train.test_run import same, weights
from train import assembly
from train.config import TrainConfig
from train.run import train
from train.saving import checkpoints


def second_is_nan(losses: Tensor, _: Any) -> Tensor:
    return losses * torch.tensor([1.0, math.nan])


def infinite_gradient(losses: Tensor, controlnet: Any) -> Tensor:
    weight = next(one for one in controlnet.parameters() if one.requires_grad).flatten()[0]
    return losses + (weight - weight.detach()).abs().sqrt()


def key(config: TrainConfig, place: int) -> str:
    from train.data import TrainingSamples
    from train.inputs import find_inputs

    inputs = find_inputs(config, 1)
    samples = TrainingSamples([inputs.cache], inputs.order, seed=0, proportion_empty_prompts=0)
    return samples.key(place)


def test_the_sample_whose_loss_is_not_finite_is_named(
    train_config: TrainConfig, in_batch: Callable[[int, Spoil], None]
) -> None:
    in_batch(3, second_is_nan)
    culprit = key(train_config, 2 * 2 + 1)
    with pytest.raises(
        RunError, match=rf"^step 3: the loss is not finite of {culprit} .nan.\. Its"
    ):
        train(train_config)
    assert [path.name for path in checkpoints.find(train_config.output_dir)] == ["checkpoint-2"]


def test_all_samples_of_the_step_are_named_where_only_the_gradient_is_at_fault(
    train_config: TrainConfig, in_batch: Callable[[int, Spoil], None]
) -> None:
    in_batch(4, infinite_gradient)
    # Two batches of two a step: the fourth batch is in step 2, of places 4 to 7.
    config = replace(train_config, gradient_accumulation_steps=2)
    keys = ", ".join(key(config, place) for place in range(4, 8))
    with pytest.raises(RunError, match=f"step 2: no loss but the gradient is not finite of {keys}"):
        train(config)


def plain_adamw(config: TrainConfig, parameters: list[Any], _: int) -> Any:
    """Return an optimiser that cannot be told to leave a step out, as bitsandbytes' cannot."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, foreach=True)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("spoil", [second_is_nan, infinite_gradient])
def test_a_step_that_is_left_out_changes_nothing(
    train_config: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    monkeypatch: pytest.MonkeyPatch,
    spoil: Spoil,
    fused: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not fused:
        monkeypatch.setattr(assembly, "make_optimizer", plain_adamw)
    in_batch(2, spoil)
    config = replace(train_config, on_nonfinite="skip", checkpointing_steps=1)
    train(config)
    one, two, three = (config.output_dir / f"checkpoint-{step}/controlnet" for step in (1, 2, 3))
    assert same(one, two)
    assert not same(two, three)
    assert all(tensor.isfinite().all() for tensor in weights(config.output_dir).values())
    output = capsys.readouterr().out
    assert "step 2: " in output
    assert "1 steps were left out" in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    train_config: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    command: Callable[..., Outcome],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
) -> None:
    def receive(losses: Tensor, _: Any) -> Tensor:
        for _ in range(2):  # a launcher sends on what its processes have received already
            os.kill(os.getpid(), number)
        return losses

    config = replace(train_config, checkpointing_steps=500, ema_decay=0.9)
    train(config)
    stopped = replace(config, output_dir=tmp_path / "stopped")
    before = signal.getsignal(number)
    in_batch(3, receive)
    outcome = command("train", *flags(stopped))
    assert outcome.exit_code == code
    assert signal.getsignal(number) is before
    assert [path.name for path in checkpoints.find(stopped.output_dir)] == ["checkpoint-3"]
    assert not (stopped.output_dir / "config.json").exists()
    line = f"{number.name} after step 3; the same command with --resume-from-checkpoint latest"
    assert line in outcome.output
    train(replace(stopped, resume_from_checkpoint="latest"))
    assert same(config.output_dir, stopped.output_dir)
    assert same(config.output_dir / "controlnet_ema", stopped.output_dir / "controlnet_ema")


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Let no file grow beyond 100 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_checkpoint_before(
    train_config: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    small_files: Callable[[], None],
    command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    def fill(losses: Tensor, _: Any) -> Tensor:
        small_files()
        return losses

    in_batch(3, fill)
    outcome = command("train", *flags(replace(train_config, checkpoints_total_limit=1)))
    assert outcome.exit_code == 2
    line = outcome.output.strip().splitlines()[-1]
    assert line.startswith(f"Error: {train_config.output_dir}/checkpoint-4 could not be written (")
    assert "; checkpoint-2 is kept. Make room, or give --checkpoints-total-limit" in line
    present = sorted(path.name for path in train_config.output_dir.glob("checkpoint*"))
    assert present == ["checkpoint-2"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    train(replace(train_config, resume_from_checkpoint="latest"))
    whole = replace(train_config, output_dir=tmp_path / "whole")
    train(whole)
    assert same(whole.output_dir, train_config.output_dir)
