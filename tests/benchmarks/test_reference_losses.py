"""The comparison with diffusers' own script; the script is no part of this repository."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.reference import losses
from benchmarks.reference.losses import differences
from benchmarks.reference.runs import flags
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from tests.conftest import run_python
from train.data import TrainingSamples

SCRIPT = os.environ.get("REFERENCE_SCRIPT")


@pytest.mark.slow
@pytest.mark.skipif(SCRIPT is None, reason="REFERENCE_SCRIPT names no train_controlnet_sd3.py")
def test_the_references_losses_are_ours(tmp_path: Path) -> None:
    done = run_python(
        *("-m", "benchmarks.reference.losses", "--reference-script", SCRIPT),
        *("--work-dir", tmp_path, "--json", tmp_path / "figures.json"),
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_what_is_handed_over_is_what_training_draws(
    cache: Path, circles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "NUM_ROWS", 10)
    monkeypatch.setattr(losses, "STEPS", 3)
    found = losses.training_draws(cache, circles)
    opened = Cache(cache)
    order = Order(opened.conditioning.product.shard_records, seed=0)
    samples = TrainingSamples([opened], unmixed(order), seed=0, proportion_empty_prompts=0.0)
    for step in range(3):
        batch = samples.fill(samples.allocate(4), range(4 * step, 4 * step + 4))
        assert torch.equal(batch.noise, torch.from_numpy(found["noise"][step]))
        expected = torch.sigmoid(batch.normal)
        torch.testing.assert_close(expected, torch.from_numpy(found["density"][step]))
    assert found["rows"].shape == (3, 4)
    assert sorted(found["rows"].flatten()[:10]) == list(range(10))


def test_the_posteriors_draws_are_handed_over(held_out: Path, circles: Path) -> None:
    opened = Cache(held_out)
    order = Order(opened.manifest.training_records("conditioning"), seed=0)
    samples = TrainingSamples([opened], unmixed(order), seed=0, proportion_empty_prompts=0.0)
    memory = samples.allocate(1)
    draws = {name: tensor.numpy() for name, tensor in memory.draws.items()}
    samples.draw(draws, 0, 5, num_prompts=1)
    drawn = {name: array.copy() for name, array in draws.items()}
    batch = samples.fill(samples.allocate(1), [5])
    _, tensors, _ = opened.sample(*order.record(5))
    for name in ("latent", "conditioning_latent"):
        expected = tensors[name].numpy() + tensors[f"{name}_std"].numpy() * drawn[name][0]
        np.testing.assert_allclose(getattr(batch, name)[0].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_how_far_apart_losses_are() -> None:
    reference = [2.0] * losses.STEPS
    ours = [2.0] * (losses.STEPS - 1) + [1.5]
    assert differences(reference, ours)["largest_relative_difference"] == pytest.approx(0.25)
    assert flags(a_b=1, c="x") == ["--a-b", "1", "--c", "x"]
