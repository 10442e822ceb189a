"""Training steps on the device: each option beside the plain step."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.presets import reset_accelerate
from benchmarks.reference.runs import logged_losses
from tests.conftest import run_python, two_processes
from tests.train.test_run import assert_close, same, weights
from train import models
from train.config import TrainConfig
from train.run import train

pytestmark = pytest.mark.gpu
MOVES: list[dict[str, Any]] = [
    {"checkpointing": "full"},
    {"offload_activations": True},
    {"offload_activations": True, "checkpointing": "full"},
    {"offload_optimizer": True},
    {"offload_base": 4},
    {"offload_base": 3, "offload_activations": True, "checkpointing": "full"},
    {"fused_backward_pass": True},
    {"fused_backward_pass": True, "offload_optimizer": True},
    {"dataloader_num_workers": 2},
]
# How far the losses may be from float32's, relative: the blocks' outputs are 2, 4 and 15 % off at
# most (tests/train/memory/test_lean.py), and the loss is of the last layer's alone.
QUANTIZED = {"int8": 0.02, "fp8": 0.04, "nf4": 0.15}


def losses(config: TrainConfig) -> list[float]:
    """Train; return the loss of each step."""
    reset_accelerate()  # it holds the precision of the run before
    train(config)
    found = logged_losses(config.output_dir)
    assert len(found) == config.max_train_steps
    return found


def moved(config: TrainConfig) -> torch.Tensor:
    """Return how far training moved all weights, as one vector."""
    start = models.new_controlnet(Path(config.pretrained_model_name_or_path), None, 2).state_dict()
    end = weights(config.output_dir)
    return torch.cat([(end[name].float() - start[name]).flatten() for name in sorted(end)])


def test_a_step_in_bf16_is_that_in_float32(plain: TrainConfig, tmp_path: Path) -> None:
    exact = replace(plain, max_train_steps=1, output_dir=tmp_path / "exact")
    half = replace(exact, mixed_precision="bf16", output_dir=tmp_path / "bf16")
    # bfloat16 rounds by 2^-9 at most, in each of a dozen layers one after another.
    assert losses(half) == pytest.approx(losses(exact), rel=12 * 2**-9)
    one, other = moved(exact), moved(half)
    assert one.norm() > 0
    assert torch.cosine_similarity(one, other, dim=0) > 0.99
    assert (other.norm() / one.norm()).item() == pytest.approx(1, rel=0.05)


@pytest.mark.usefixtures("small_tensors_offloaded")
@pytest.mark.parametrize("settings", MOVES, ids=" and ".join)
def test_what_only_moves_numbers_changes_none(
    settings: dict[str, Any], plain: TrainConfig, tmp_path: Path
) -> None:
    expected = logged_losses(plain.output_dir)
    other = replace(plain, output_dir=tmp_path / "other", **settings)
    found = losses(other)
    # A GPU adds attention's gradients in any order; nothing came before the first loss.
    assert found[0] == expected[0]
    assert found == pytest.approx(expected, rel=1e-4)
    assert_close(plain.output_dir, other.output_dir)
    assert moved(plain).norm() > 1e-3


def test_8_bit_adam_learns_the_same(plain: TrainConfig, tmp_path: Path) -> None:
    expected = logged_losses(plain.output_dir)
    other = replace(plain, optimizer="adamw8bit", output_dir=tmp_path / "other")
    assert losses(other) == pytest.approx(expected, rel=0.02)
    one, two = moved(plain), moved(other)
    assert torch.cosine_similarity(one, two, dim=0) > 0.95


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantised_base_gives_nearly_the_same(
    kind: str, plain: TrainConfig, tmp_path: Path
) -> None:
    expected = logged_losses(plain.output_dir)
    other = replace(plain, quantize_base=kind, output_dir=tmp_path / "other")
    found = losses(other)
    assert found == pytest.approx(expected, rel=QUANTIZED[kind])
    assert found[0] != expected[0]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind", [None, *QUANTIZED])
def test_compiled_is_the_same(kind: Any, plain: TrainConfig, tmp_path: Path) -> None:
    eager = replace(plain, quantize_base=kind, max_train_steps=2, output_dir=tmp_path / "eager")
    compiled = replace(eager, compile=True, output_dir=tmp_path / "compiled")
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


@pytest.mark.usefixtures("card")
def test_fp16_trains_float32_weights(plain: TrainConfig, tmp_path: Path) -> None:
    half = replace(plain, mixed_precision="fp16", output_dir=tmp_path / "half")
    # The first alone: the scale of the loss may be too large for steps after it.
    assert losses(half)[0] == pytest.approx(logged_losses(plain.output_dir)[0], rel=0.01)
    assert {tensor.dtype for tensor in weights(half.output_dir).values()} == {torch.float32}


def test_bfloat16_weights_learn_the_same(plain: TrainConfig, tmp_path: Path) -> None:
    exact = replace(plain, mixed_precision="bf16", output_dir=tmp_path / "exact")
    rounded = replace(exact, bf16_weights=True, output_dir=tmp_path / "rounded")
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.02)
    assert {one.dtype for one in weights(rounded.output_dir).values()} == {torch.bfloat16}


@pytest.mark.usefixtures("small_tensors_offloaded")
@pytest.mark.parametrize("settings", [{}, {"offload_optimizer": True}], ids=" and ".join)
def test_a_checkpoint_goes_on(settings: dict[str, Any], plain: TrainConfig, tmp_path: Path) -> None:
    halves = replace(
        plain, output_dir=tmp_path / "halves", resume_from_checkpoint="latest", **settings
    )
    train(replace(halves, max_train_steps=2))
    train(halves)
    assert_close(plain.output_dir, halves.output_dir)


@pytest.mark.usefixtures("two_cards")
def test_two_cards_do_what_one_does(plain: TrainConfig, tmp_path: Path) -> None:
    both = replace(plain, train_batch_size=1, output_dir=tmp_path / "both")
    done = run_python(*two_processes(both))
    assert done.returncode == 0, done.stderr
    assert_close(plain.output_dir, both.output_dir)


def test_deterministic_runs_end_in_the_same_bits(plain: TrainConfig, tmp_path: Path) -> None:
    one = replace(plain, mixed_precision="bf16", deterministic=True, output_dir=tmp_path / "one")
    other = replace(one, output_dir=tmp_path / "other")
    assert losses(one) == losses(other)
    assert same(one.output_dir, other.output_dir)
