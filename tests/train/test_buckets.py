"""Training on images of several shapes: each step of one, resumed exactly, pictures of any."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.errors import ConfigError
from shards.format import manifest
from shards.format.keys import record_key
from shards.format.product import product_of
from shards.format.records import Record
from shards.format.writer import write_shard
from shards.reading.cache import Cache
from shards.reading.tensors import torch_dtype
from tests.conftest import BUCKETS, Outcome, flags, train_in_two_processes
from tests.train.test_run import assert_close, near_gradient_descent, same
from train import loop
from train.config import TrainConfig
from train.data import Batch
from train.run import train
from train.saving import checkpoints
from train.validation import sampling


@pytest.fixture
def config(train_config: TrainConfig, bucketed: Path) -> TrainConfig:
    """Six steps of two batches of two."""
    return replace(
        train_config, cache=(str(bucketed),), gradient_accumulation_steps=2, max_train_steps=6
    )


def shapes_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that fills with the shapes of the latents that training takes."""
    taken: list[tuple[int, ...]] = []
    original = loop.batch_losses

    def batch_losses(batch: Batch, *others: object) -> torch.Tensor:
        taken.append(tuple(batch.latent.shape))
        return original(batch, *others)

    monkeypatch.setattr(loop, "batch_losses", batch_losses)
    return taken


def test_each_step_is_of_one_shape(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = shapes_of(monkeypatch)
    train(replace(config, max_train_steps=None, num_train_epochs=1))
    # 15, 10 and 10 samples in steps of four: 4 + 3 + 3 of them.
    assert checkpoints.find(config.output_dir)[-1].name == "checkpoint-10"
    assert len(taken) == 20
    assert taken[::2] == taken[1::2]
    counts = [taken[::2].count((2, 16, *bucket)) for bucket in BUCKETS]
    assert counts == [4, 3, 3]
    state = checkpoints.read_state(config.output_dir / "checkpoint-10")
    assert (state.place, state.bucket_group) == (40, 4)


def test_resuming_among_buckets_ends_where_the_undisturbed_run_does(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, shuffle_window=3, dataloader_num_workers=2)
    train(config)
    resumed = replace(config, output_dir=tmp_path / "resumed", resume_from_checkpoint="latest")
    shutil.copytree(config.output_dir / "checkpoint-2", resumed.output_dir / "checkpoint-2")
    train(resumed)
    assert same(config.output_dir, resumed.output_dir)


def test_a_step_may_be_shared_out_otherwise_but_not_change(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = near_gradient_descent(replace(config, lr_scheduler="constant"))
    train(config)
    other = replace(config, output_dir=tmp_path / "other")
    train(replace(other, max_train_steps=2))
    resumed = replace(other, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match=r"samples a step, all of one bucket +4 +8\n"):
        train(replace(resumed, train_batch_size=4))
    train(replace(resumed, train_batch_size=4, gradient_accumulation_steps=1))
    assert_close(config.output_dir, other.output_dir)


@pytest.mark.slow
def test_two_processes_train_as_one_on_the_same_shapes(config: TrainConfig, tmp_path: Path) -> None:
    config = near_gradient_descent(config)
    train(config)
    two = replace(config, train_batch_size=1, output_dir=tmp_path / "two")
    train_in_two_processes(two)
    assert_close(config.output_dir, two.output_dir)
    state = checkpoints.read_state(two.output_dir / "checkpoint-6")
    assert (state.place, state.bucket_group) == (24, 4)


@pytest.fixture
def with_pairs(bucketed: Path, tmp_path: Path) -> Path:
    """The cache with two validation pairs, each of a bucket and in a shard of its own."""
    cache = tmp_path / "with pairs"
    shutil.copytree(bucketed, cache)
    found = manifest.load(cache)
    folder = cache / manifest.validation_folder("conditioning")
    generator = torch.Generator().manual_seed(0)

    def pair(shard: int, bucket: int) -> Record:
        tensors = {
            name: torch.full(spec.shape, 200, dtype=torch.uint8)
            if spec.dtype == "uint8"
            else torch.randn(spec.shape, generator=generator).to(torch_dtype(spec))
            for name, spec in found.record_specs(
                manifest.validation_folder("conditioning"), bucket
            ).items()
        }
        return Record(record_key(shard, 0, f"{shard:016x}"), tensors, {"prompt": f"pair {shard}"})

    cards = [
        write_shard(folder, shard, [pair(shard, bucket)], fingerprint="0")
        for shard, bucket in enumerate([1, 0])
    ]
    product = product_of(folder, cards, [1, 0])
    manifest.write(cache, replace(found, validation={"conditioning": product}))
    return cache


def test_validation_pairs_are_drawn_in_their_own_shapes(
    config: TrainConfig, with_pairs: Path
) -> None:
    pairs = sampling.read_pairs(Cache(with_pairs))
    assert [pair.conditioning_latent.shape for pair in pairs] == [(16, 4, 12), (16, 8, 8)]
    train(
        replace(
            config,
            cache=(str(with_pairs),),
            max_train_steps=1,
            validation_steps=1,
            num_validation_images=2,
            validation_inference_steps=2,
            report_to="tensorboard",
        )
    )
    drawn = sorted((config.output_dir / "validation/step-000001").glob("*.png"))
    # The conditioning image and two pictures side by side.
    assert [Image.open(path).size for path in drawn] == [(3 * 96, 32), (3 * 64, 64)]


def test_the_command_says_how_long_an_epoch_is(
    config: TrainConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("train", *flags(replace(config, max_train_steps=1)))
    assert outcome.exit_code == 0
    assert (
        "train: 35 samples in 3 buckets, filled up to 40 an epoch, 1 steps of 4" in outcome.output
    )
