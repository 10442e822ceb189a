"""What saves memory or time and must not change what is learnt."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.against_reference import logged_losses
from shards.errors import ConfigError
from tests.conftest import Outcome, Spoil, flags
from tests.test_train_faults import second_is_nan
from tests.test_train_run import same, weights
from train import fused_backward, models, quantized
from train.config import TrainConfig
from train.run import train


@pytest.fixture
def unclipped(train_config: TrainConfig) -> TrainConfig:
    """Every step's loss, and no clipping."""
    return replace(train_config, max_grad_norm=0.0, logging_steps=1, report_to="tensorboard")


def test_steps_within_the_backward_pass_give_the_same_bits(
    unclipped: TrainConfig, tmp_path: Path
) -> None:
    train(unclipped)
    fused = replace(unclipped, output_dir=tmp_path / "fused", fused_backward_pass=True)
    train(fused)
    assert logged_losses(fused.output_dir) == logged_losses(unclipped.output_dir)
    assert same(fused.output_dir, unclipped.output_dir)


def test_checkpoints_go_on_with_and_without(unclipped: TrainConfig, tmp_path: Path) -> None:
    train(unclipped)
    mixed = replace(unclipped, output_dir=tmp_path / "mixed", resume_from_checkpoint="latest")
    train(replace(mixed, max_train_steps=2, lr_scheduler="cosine", fused_backward_pass=True))
    # The schedule is that of four steps again.
    assert not same(mixed.output_dir, unclipped.output_dir)
    constant = replace(unclipped, lr_scheduler="constant", output_dir=tmp_path / "constant")
    train(constant)
    other = replace(
        constant, output_dir=tmp_path / "other", resume_from_checkpoint="latest", max_train_steps=2
    )
    train(replace(other, fused_backward_pass=True))
    train(replace(other, max_train_steps=4))
    assert same(other.output_dir, constant.output_dir)


def test_no_gradient_outlives_its_step() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    alive: list[int] = []
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    fused = fused_backward.FusedBackward(optimizer)
    for parameter in layers.parameters():
        parameter.register_hook(
            lambda _: alive.append(sum(one.grad is not None for one in layers.parameters()))
        )
    before = [parameter.detach().clone() for parameter in layers.parameters()]
    layers(torch.randn(2, 8)).sum().backward()
    assert len(alive) == 8
    assert max(alive) == 0
    assert not fused.bad()
    assert all(
        not torch.equal(one, other) for one, other in zip(layers.parameters(), before, strict=True)
    )


def test_weights_without_finite_gradients_stay(
    unclipped: TrainConfig,
    in_batch: Callable[[int, Spoil], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    in_batch(2, second_is_nan)
    config = replace(
        unclipped, fused_backward_pass=True, on_nonfinite="skip", checkpointing_steps=1
    )
    train(config)
    one, two, three = (config.output_dir / f"checkpoint-{step}/controlnet" for step in (1, 2, 3))
    before, after = weights(one), weights(two)
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    # What the last block's text asks has no effect, so its gradient is zero whatever the loss is.
    unheard = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
    assert changed <= {f"transformer_blocks.1.{name}" for name in unheard}
    assert not same(two, three)
    assert "step 2: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"max_grad_norm": 1.0}, {}, "--max-grad-norm 1 clips the norm of all"),
        ({"gradient_accumulation_steps": 2}, {}, "--gradient-accumulation-steps keeps"),
        ({}, {"num_processes": 2}, "several processes exchange theirs first"),
        ({}, {"scales": True}, "--mixed-precision fp16 looks at all"),
    ],
)
def test_what_needs_all_gradients_is_refused(
    unclipped: TrainConfig, settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    alone: dict[str, Any] = {"num_processes": 1, "scales": False}
    fused_backward.check(unclipped, **alone)
    with pytest.raises(ConfigError, match=f"^--fused-backward-pass: {message}"):
        fused_backward.check(replace(unclipped, **settings), **(alone | more))


def test_clipping_and_steps_in_the_backward_pass_end_in_one_line(
    train_config: TrainConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("train", *flags(replace(train_config, fused_backward_pass=True)))
    assert outcome.exit_code == 2
    assert "--max-grad-norm 0 leaves that out" in outcome.output
    assert not train_config.output_dir.exists()


def rounded_rows(weight: Tensor, largest: float) -> Tensor:
    """Return rows rounded to steps of their largest value over `largest`."""
    scale = weight.abs().amax(dim=1, keepdim=True) / largest
    return (weight / scale).round() * scale


def rounded_to_fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


# The sixteen values of NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E.
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]


def rounded_to_nf4(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 64)
    scale = groups.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4)
    nearest = ((groups / scale)[..., None] - values).abs().argmin(dim=-1)
    return (values[nearest] * scale).reshape(weight.shape)


@pytest.mark.parametrize(
    ("kind", "rounded", "error"),
    [
        ("int8", lambda weight: rounded_rows(weight, 127.5), 0.02),
        ("fp8", rounded_to_fp8, 0.04),
        ("nf4", rounded_to_nf4, 0.15),
    ],
)
def test_quantised_layers_compute_with_rounded_weights(
    kind: str, rounded: Callable[[Tensor], Tensor], error: float, base: Path
) -> None:
    pytest.importorskip(quantized.PACKAGES[kind])
    exact = models.load_transformer(base, None, torch.float32)
    transformer = models.load_transformer(base, None, torch.float32, kind).to("cpu")
    assert transformer.dtype == torch.float32
    plain = exact.transformer_blocks[0].ff.net[2]
    layer = transformer.transformer_blocks[0].ff.net[2]
    inputs = torch.randn(3, plain.in_features, requires_grad=True)
    found = layer(inputs)
    expected = nn.functional.linear(inputs, rounded(plain.weight.detach()), plain.bias)
    assert (found - expected).norm() < 2e-3 * (expected - plain.bias).norm()
    away = (found - plain(inputs)).norm() / (plain(inputs) - plain.bias).norm()
    assert 1e-3 < away < error
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    (right,) = torch.autograd.grad(expected.sum(), inputs)
    assert (gradient - right).norm() < 2e-3 * right.norm()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
def test_training_beside_a_quantised_base(
    kind: str, error: float, unclipped: TrainConfig, tmp_path: Path
) -> None:
    pytest.importorskip(quantized.PACKAGES[kind])
    train(unclipped)
    config = replace(unclipped, output_dir=tmp_path / kind, quantize_base=kind)
    train(config)
    exact, found = logged_losses(unclipped.output_dir), logged_losses(config.output_dir)
    assert found != exact
    assert found == pytest.approx(exact, rel=error)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(unclipped: TrainConfig, tmp_path: Path) -> None:
    train(unclipped)
    config = replace(
        unclipped, output_dir=tmp_path / "compiled", compile=True, gradient_checkpointing=True
    )
    train(config)
    assert logged_losses(config.output_dir) == pytest.approx(
        logged_losses(unclipped.output_dir), rel=1e-4
    )
