"""Which noise levels are drawn: shifted schedules, parts of them, one stratum a sample."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.stats import ks_2samp, kstest
from torch import Tensor

from common.errors import ConfigError
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from train import inputs, objective
from train.config import TrainConfig
from train.data import TrainingSamples
from train.inputs import find_timesteps
from train.loss import Objective, noise_levels
from train.objective import Timesteps
from train.run import train

SCHEMES = ("logit_normal", "mode", "none")
COUNT = 20_000


def table(shift: float) -> Tensor:
    """The stock scheduler's noise levels."""
    sigmas: Tensor = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    return sigmas


@pytest.mark.parametrize("shift", [0.4, 1.5, 6.0])
def test_a_further_shift_is_the_stock_schedulers(shift: float) -> None:
    found = objective.shifted(table(3.0), shift / 3.0)
    torch.testing.assert_close(found, table(shift), rtol=1e-5, atol=1e-6)


def test_by_resolution_the_base_keeps_its_own_at_its_own_size(
    train_config: TrainConfig, base: Path
) -> None:
    """The miniature was made for a grid of 16 x 16; the shift goes with the root of the cells."""
    schedule = find_timesteps(replace(train_config, shift="resolution"), base, 3.0)
    assert schedule.shift_for(16, 16) == 1.0
    assert schedule.shift_for(8, 8) == 0.5  # of 3: 1.5
    assert schedule.shift_for(32, 8) == 1.0
    for text, expected in ((None, 1.0), ("6", 2.0), ("1.5", 0.5)):
        assert find_timesteps(replace(train_config, shift=text), base, 3.0).shift_for(
            8, 8
        ) == pytest.approx(expected)


def draws(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(COUNT, generator=generator), torch.randn(COUNT, generator=generator)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("first", "last"), [(0.2, 0.55), (0.0, 0.3), (0.9, 1.0)])
def test_a_part_is_drawn_as_the_whole_would_fall_into_it(
    scheme: str, first: float, last: float
) -> None:
    """Held against draws of the whole density of which only those within the part are taken."""
    settings = {"scheme": scheme, "logit_mean": -0.4, "logit_std": 0.8, "mode_scale": 1.29}
    ends = torch.tensor(first), torch.tensor(last)
    mapped = objective.restricted(*draws(0), first=ends[0], last=ends[1], **settings)
    found = objective.timestep_density(*mapped, **settings)
    assert found.min() >= first - 1e-6
    assert found.max() <= last + 1e-6
    whole = torch.cat(
        [objective.timestep_density(*draws(seed), **settings) for seed in range(1, 9)]
    )
    taken = whole[(whole >= first) & (whole <= last)]
    assert len(taken) > 50
    assert ks_2samp(found.numpy(), taken.numpy()).pvalue > 1e-3


class OneBatch:
    """The draws of a batch, and a latent's shape."""

    def __init__(self, side: int) -> None:
        self.uniform, self.normal = draws(0)
        self.latent = torch.zeros(1, 16, side, side)


@pytest.fixture
def settings(train_config: TrainConfig) -> Objective:
    return inputs.make_objective(
        train_config, inputs.find_inputs(train_config, 1), torch.device("cpu")
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_timestep_outside_is_drawn(settings: Objective, scheme: str) -> None:
    for native in (None, 256):
        schedule = Timesteps(1.0, native, 250, 600)
        cut = replace(settings, weighting_scheme=scheme, schedule=schedule)
        sigma, timestep = noise_levels(OneBatch(8), cut)  # type: ignore[arg-type]
        assert 250 <= timestep.min() < 260
        assert 590 < timestep.max() <= 600
        torch.testing.assert_close(sigma * 1000, timestep)
        levels = table(3.0 if native is None else 1.5)
        assert torch.isin(sigma, objective.shifted(table(3.0), 0.5) if native else levels).all()


def test_each_sample_of_a_step_has_a_stratum(cache: Path) -> None:
    opened = Cache(cache)
    order = Order(opened.manifest.training_records("conditioning"), seed=0, window=4)
    plain, strata = (
        TrainingSamples(
            [opened], unmixed(order), seed=5, proportion_empty_prompts=0.5, strata=count
        )
        for count in (1, 8)
    )
    for step in range(3):
        places = range(8 * step, 8 * step + 8)
        found = [strata[place] for place in places]
        uniform = np.array([float(each["uniform"]) for each in found])
        assert sorted((uniform * 8).astype(int)) == list(range(8))
        normal = np.array([float(each["normal"]) for each in found])
        # One draw: the normal is the uniform's quantile.
        erf = torch.special.erf(torch.from_numpy(normal / np.sqrt(2)))
        np.testing.assert_allclose((1 + erf.numpy()) / 2, uniform, atol=1e-6)
        for place, each in zip(places, found, strict=True):
            same = plain[place]
            for name in each.keys() - {"uniform", "normal"}:
                assert torch.equal(each[name], same[name]), name
    orders = [
        [int(float(strata[8 * step + each]["uniform"]) * 8) for each in range(8)]
        for step in range(3)
    ]
    assert orders[0] != orders[1] != orders[2]


def test_the_density_stays_and_the_mean_of_a_batch_varies_less(cache: Path) -> None:
    """Over 200 batches of 16: the variance of the mean of a smooth loss."""
    opened = Cache(cache)
    order = Order(opened.manifest.training_records("conditioning"), seed=0, window=4)
    names = {"uniform": np.empty(1, np.float32), "normal": np.empty(1, np.float32)}
    variance = {}
    for count in (1, 16):
        samples = TrainingSamples(
            [opened], unmixed(order), seed=1, proportion_empty_prompts=0, strata=count
        )
        samples.drawn_latents = []
        drawn = []
        for place in range(200 * 16):
            samples.draw(names, 0, place, 1)
            drawn.append((float(names["uniform"][0]), float(names["normal"][0])))
        uniform, normal = np.array(drawn).T
        assert kstest(uniform, "uniform").pvalue > 1e-3
        assert kstest(normal, "norm").pvalue > 1e-3
        loss = 1 / (1 + np.exp(-normal))  # the density of logit_normal itself
        variance[count] = loss.reshape(200, 16).mean(axis=1).var()
    # Of a function that is monotone in the draw, stratification takes a factor of about N.
    assert variance[16] < 0.05 * variance[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": "much"}, r"--shift much: a number above 0, or resolution\."),
        ({"shift": "0"}, "--shift 0: a number above 0"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min-timestep 500 and --max-timestep 500"),
        ({"max_timestep": 1001}, "between 0 and 1000"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    train_config: TrainConfig, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(train_config, **options)  # type: ignore[arg-type]


def test_a_part_without_an_entry_is_refused(train_config: TrainConfig) -> None:
    """The stock schedule's lowest timestep, shifted by 3, is 3.0."""
    with pytest.raises(ConfigError, match=r"has no timestep between them; its lowest is 3\.0"):
        train(replace(train_config, max_timestep=2))


def test_all_of_it_trains(train_config: TrainConfig) -> None:
    config = replace(
        train_config,
        shift="resolution",
        min_timestep=100,
        max_timestep=900,
        stratified_timesteps=True,
        max_train_steps=1,
    )
    train(config)
    assert (config.output_dir / "config.json").is_file()
