"""The held-out loss: known values, the same each time, and on any number of processes."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3ControlNetModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from common.errors import ShardError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.reading.cache import Cache, SampleRecords
from tests.conftest import Spoil, awaken, train_in_two_processes
from train import inputs, models
from train.config import TrainConfig
from train.loss import Objective
from train.run import train
from train.validation import held_out as measured
from train.validation.held_out import (
    NUM_LEVELS,
    batches,
    held_out_records,
    measurements,
    read,
    velocity_losses,
)


@pytest.fixture
def config(train_config: TrainConfig, held_out: Path) -> TrainConfig:
    return replace(
        train_config, cache=(str(held_out),), validation_steps=2, num_validation_images=1
    )


@pytest.fixture
def objective(config: TrainConfig) -> Objective:
    return inputs.make_objective(config, inputs.find_inputs(config, 1), torch.device("cpu"))


class Oracle(torch.nn.Module):
    """A transformer that always returns the same velocity and records its inputs."""

    def __init__(self, velocity: Tensor) -> None:
        super().__init__()
        self.velocity = velocity
        self.asked: list[dict[str, Tensor]] = []
        self.dtype = torch.float32

    def forward(self, **asked: Tensor) -> tuple[Tensor]:
        self.asked.append(asked)
        return (self.velocity,)


def no_control(**_: Tensor) -> tuple[list[Tensor]]:
    return ([],)


def test_levels_are_eighths_and_losses_the_squared_error_of_the_velocity(
    held_out: Path, objective: Objective
) -> None:
    cache = Cache(held_out)
    samples = read(cache, held_out_records(cache)[:2])
    levels = torch.tensor([2, 7])
    scaled = (samples.latent - objective.latent_spec.shift_factor) * (
        objective.latent_spec.scaling_factor
    )
    right = samples.noise - scaled
    off = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    oracle = Oracle(right + off)
    losses = velocity_losses(samples, levels, no_control, oracle, objective)
    torch.testing.assert_close(losses, torch.tensor([1.0, 9.0]))
    (asked,) = oracle.asked
    assert asked["timestep"].tolist() == [250, 875]
    for sample, share in enumerate((2 / 8, 7 / 8)):
        expected = (1 - share) * scaled[sample] + share * samples.noise[sample]
        torch.testing.assert_close(asked["hidden_states"][sample], expected)


@pytest.mark.parametrize(("num_rows", "num_measured"), [(3, 8), (8, 8), (13, 16), (256, 256)])
def test_each_row_is_measured_at_one_level_and_each_level_as_often(
    held_out: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, num_measured: int
) -> None:
    """One forward pass a row; a few rows again where they are no multiple of eight."""
    rows = [(0, row) for row in range(num_rows)]
    monkeypatch.setattr(measured, "held_out_records", lambda _: rows)
    found = measurements(Cache(held_out))
    assert len(found) == num_measured
    assert [number for number, _ in found] == list(range(num_measured))
    assert [record for _, record in found][:num_rows] == rows
    at_level = Counter(number % NUM_LEVELS for number, _ in found)
    assert at_level == dict.fromkeys(range(8), num_measured // 8)
    # No row twice at one level.
    assert len({(number % NUM_LEVELS, record) for number, record in found}) == num_measured


def test_the_noise_belongs_to_the_image(held_out: Path) -> None:
    cache = Cache(held_out)
    records = held_out_records(cache)
    assert len(records) == 3
    together, alone = read(cache, records), read(cache, records[1:2])
    assert torch.equal(together.noise[1], alone.noise[0])
    assert not torch.equal(together.noise[0], together.noise[1])
    assert abs(float(together.noise.mean())) < 0.1
    assert float(together.noise.std()) == pytest.approx(1, abs=0.05)


def test_the_first_of_several_captions_is_taken(
    held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(held_out)
    plain, found = read(cache, held_out_records(cache)), cache.sample_records

    def captioned_twice(shard: int, index: int) -> SampleRecords:
        sample = found(shard, index)
        return sample._replace(prompts=[*sample.prompts, cache.empty_prompt_key()])

    monkeypatch.setattr(cache, "sample_records", captioned_twice)
    twice = read(cache, held_out_records(cache))
    assert torch.equal(twice.t5_embeds, plain.t5_embeds)
    assert not torch.equal(plain.t5_embeds[0], cache.empty_prompt()["t5_embeds"])


def test_batches_are_of_one_bucket(bucketed: Path) -> None:
    cache = Cache(bucketed)
    cache.manifest.held_out.extend([1, 2, 3, 4])
    found = batches(cache, 4)
    rows = [(shard, index) for shard in (1, 2, 3, 4) for index in range(5)]
    assert sorted(measurement for batch in found for measurement in batch) == [
        *enumerate(rows),
        *enumerate(rows[:4], start=20),
    ]
    for batch in found:
        assert len({cache.conditioning.bucket(record[0]) for _, record in batch}) == 1
        assert 1 <= len(batch) <= 4


class Rank(Accelerator):
    """One of two processes, whose sums are kept instead of sent."""

    def __init__(self, rank: int) -> None:
        super().__init__(cpu=True)
        self.rank = rank
        self.sums: list[Tensor] = []

    @property
    def process_index(self) -> int:
        return self.rank

    @property
    def num_processes(self) -> int:
        return 2

    def reduce(self, tensor: Tensor, **_: object) -> Tensor:
        self.sums.append(tensor)
        return tensor


def test_two_processes_measure_what_one_does(
    held_out: Path, base: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(held_out)
    controlnet, transformer = (
        models.new_controlnet(base, None, 2),
        models.load_transformer(base, None, torch.float32),
    )
    awaken(controlnet)
    common = (controlnet, transformer, objective)
    whole = measured.held_out_loss(cache, Accelerator(cpu=True), *common, 2)
    assert len(whole) == NUM_LEVELS
    passes: list[int] = []
    original = measured.velocity_losses
    monkeypatch.setattr(
        measured, "velocity_losses", lambda *args: passes.append(0) or original(*args)
    )
    ranks = [Rank(0), Rank(1)]
    for rank in ranks:
        measured.held_out_loss(cache, rank, *common, 3)
    # Batches of 3, 3 and 2: the second process computes as many as the first, and counts one.
    assert len(passes) == 4
    losses = sum(rank.sums[0] for rank in ranks)
    assert losses.tolist() == pytest.approx(whole, rel=1e-5)


def test_its_batches_may_be_larger_than_trainings(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before training it is measured once: the average of the weights is the weights."""
    sizes: list[int] = []
    original = measured.velocity_losses
    monkeypatch.setattr(
        measured,
        "velocity_losses",
        lambda samples, *args: sizes.append(len(samples.noise)) or original(samples, *args),
    )
    config = replace(config, max_train_steps=1, ema_decay=0.5, validation_inference_steps=1)
    train(replace(config, validation_batch_size=5, validation_decode="latents"))
    assert sizes == [5, 3] * 3  # of eight, at step 0, and at step 1 twice
    before, after = (
        json.loads((config.output_dir / f"validation/step-00000{step}/held_out.json").read_text())
        for step in (0, 1)
    )
    assert before.keys() == {"held_out_loss"}
    assert after.keys() == {"held_out_loss", "ema_held_out_loss"}


def test_it_is_logged_whole_and_by_level_and_kept(
    config: TrainConfig, held_out: Path, base: Path, objective: Objective
) -> None:
    config = replace(config, learning_rate=1e-2, validation_inference_steps=1)
    train(replace(config, report_to="tensorboard", ema_decay=0.5, validation_decode="latents"))
    events = EventAccumulator(str(config.output_dir / "logs" / "train_controlnet")).Reload()
    for step in (0, 2, 4):
        text = (config.output_dir / f"validation/step-{step:06d}/held_out.json").read_text()
        kept = json.loads(text)
        assert kept.keys() == (
            {"held_out_loss", "ema_held_out_loss"} if step else {"held_out_loss"}
        )
        for name, levels in kept.items():
            logged = {event.step: event.value for event in events.Scalars(name)}
            assert logged[step] == pytest.approx(sum(levels) / 8)
            for level, loss in enumerate(levels):
                of_level = events.Scalars(f"{name}/level-{level}")
                assert {event.step: event.value for event in of_level}[step] == pytest.approx(loss)
    # Each under its own name: the last ones are those of the two ControlNets that were saved.
    cache, transformer = Cache(held_out), models.load_transformer(base, None, torch.float32)
    for name, folder in (("held_out_loss", "."), ("ema_held_out_loss", "controlnet_ema")):
        saved = SD3ControlNetModel.from_pretrained(config.output_dir / folder)
        again = measured.held_out_loss(
            cache, Accelerator(cpu=True), saved, transformer, objective, 2
        )
        assert kept[name] == pytest.approx(again, rel=1e-5)
    assert kept["held_out_loss"] != pytest.approx(kept["ema_held_out_loss"], rel=1e-4)


def test_it_does_not_depend_on_the_runs_seed(config: TrainConfig, tmp_path: Path) -> None:
    still = replace(config, learning_rate=0.0, adam_weight_decay=0.0, max_train_steps=1)
    kept = []
    for seed in (0, 1):
        one = replace(still, seed=seed, output_dir=tmp_path / str(seed), train_batch_size=2 + seed)
        train(one)
        kept.append(
            json.loads((one.output_dir / "validation/step-000001/held_out.json").read_text())
        )
    assert kept[0]["held_out_loss"] == pytest.approx(kept[1]["held_out_loss"], rel=1e-5)


@pytest.mark.slow
def test_two_real_processes_log_what_one_does(config: TrainConfig, tmp_path: Path) -> None:
    still = replace(config, learning_rate=0.0, adam_weight_decay=0.0, max_train_steps=1)
    train(still)
    two = replace(still, output_dir=tmp_path / "two", train_batch_size=1)
    train_in_two_processes(two)
    one, other = (
        json.loads((folder / "validation/step-000001/held_out.json").read_text())["held_out_loss"]
        for folder in (still.output_dir, two.output_dir)
    )
    assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_a_cache_that_is_changed_meanwhile_is_called_that_and_can_be_had_back(
    config: TrainConfig,
    precompute_config: PrecomputeConfig,
    in_batch: Callable[[int, Spoil], None],
    tmp_path: Path,
) -> None:
    cache = Path(shutil.copytree(config.cache[0], tmp_path / "cache"))
    before = replace(precompute_config, cache=cache, validation_rows=3, posterior="mean_std")

    def hold_out_others(losses: Tensor, _: object) -> Tensor:
        precompute(replace(before, validation_rows=2))
        return losses

    in_batch(2, hold_out_others)
    config = replace(
        config, cache=(str(cache),), max_train_steps=3, resume_from_checkpoint="latest"
    )
    # A run that goes on has not read its held-out rows before.
    train(replace(config, max_train_steps=1))
    with pytest.raises(ShardError, match="the cache was changed while the run read it") as raised:
        train(config)
    assert "\n" not in str(raised.value)
    precompute(before)
    train(config)
    assert (config.output_dir / "validation/step-000003/held_out.json").is_file()


def test_a_cache_that_is_damaged_meanwhile_is_called_damaged(
    config: TrainConfig, in_batch: Callable[[int, Spoil], None], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(config.cache[0], tmp_path / "cache"))

    def damage(losses: Tensor, _: object) -> Tensor:
        for path in (cache / "latents").glob("*.tar"):
            path.write_bytes(b"")
        return losses

    in_batch(2, damage)
    with pytest.raises(ShardError) as raised:
        train(replace(config, cache=(str(cache),)))
    assert "was changed while the run" not in str(raised.value)
