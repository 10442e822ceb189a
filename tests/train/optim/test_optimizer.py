"""AdamW and its schedule have every setting as given, by numbers worked out here."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.optim.host_elsewhere import copy_on_the_way
from train.config import TrainConfig
from train.optim import offloaded_state
from train.optim.learning_rate import describe_change, make_schedule, set_learning_rate
from train.optim.optimizer import make_optimizer

PEAK = 0.02
EXTRA = [pytest.param(name, marks=pytest.mark.extras) for name in ("adamw8bit", "lion")]
NO_ADAM = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 1e-2,
}


def settings(**changes: Any) -> TrainConfig:
    """Return settings of which none is torch's or diffusers' default."""
    unusual: dict[str, Any] = {
        "adam_beta1": 0.7,
        "adam_beta2": 0.8,
        "adam_epsilon": 0.3,
        "adam_weight_decay": 0.4,
        "learning_rate": PEAK,
        "lr_warmup_steps": 4,
        "lr_num_cycles": 3,
        "lr_power": 2.5,
    }
    return TrainConfig(cache=("",), pretrained_model_name_or_path="", **(unusual | changes))


@pytest.fixture
def host_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each way to the device a copy, as to a GPU, and all state large enough for it."""
    copy_on_the_way(monkeypatch)
    monkeypatch.setattr(offloaded_state, "MIN_OFFLOADED_NUMBERS", 2)


@pytest.mark.usefixtures("host_is_elsewhere")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_updates_by_hand(scale: bool, offload: bool) -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2."""
    start = torch.tensor([1.0, -2.0, 0.5])
    parameters = [nn.Parameter(start.clone()), nn.Parameter(start[:2].clone())]
    optimizer = make_optimizer(settings(scale_lr=scale, offload_optimizer=offload), parameters, 6)
    rate, weights = PEAK * (6 if scale else 1), start.tolist()
    first, second = [0.0] * 3, [0.0] * 3
    for step in range(1, 5):
        gradients = [0.5 * step, -0.1, 3.0 / step]
        for parameter in parameters:
            parameter.grad = torch.tensor(gradients[: len(parameter)])
        optimizer.step()
        for place, gradient in enumerate(gradients):
            first[place] = 0.7 * first[place] + 0.3 * gradient
            second[place] = 0.8 * second[place] + 0.2 * gradient**2
            mean, square = first[place] / (1 - 0.7**step), second[place] / (1 - 0.8**step)
            weights[place] *= 1 - rate * 0.4
            weights[place] -= rate * mean / (math.sqrt(square) + 0.3)
        for parameter in parameters:
            assert parameter.tolist() == pytest.approx(weights[: len(parameter)], rel=1e-5)


@pytest.mark.usefixtures("host_is_elsewhere")
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", *EXTRA])
def test_restored_state_goes_on(optimizer: str) -> None:
    def steps(optimizer: Any, parameter: nn.Parameter, numbers: range) -> None:
        for number in numbers:
            parameter.grad = torch.tensor([0.5 * number, -0.1, 3.0 / number]).repeat(2000)
            optimizer.step()

    def made() -> tuple[Any, nn.Parameter]:
        parameter = nn.Parameter(torch.ones(6000))
        adam = {} if "adamw" in optimizer else NO_ADAM
        config = settings(offload_optimizer=True, optimizer=optimizer, **adam)
        return make_optimizer(config, [parameter], 1), parameter

    whole, expected = made()
    steps(whole, expected, range(1, 5))
    before, parameter = made()
    steps(before, parameter, range(1, 3))
    after, continued = made()
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        continued.copy_(parameter)
    steps(after, continued, range(3, 5))
    assert torch.equal(continued, expected)


def test_state_within_an_inner_dictionary_is_found() -> None:
    """bitsandbytes saves some of a weight's state in one."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(settings(offload_optimizer=True), [parameter], 1)
    moments = {"exp_avg": torch.full((3,), 0.5), "exp_avg_sq": torch.full((3,), 0.25)}
    saved = {0: {"step": torch.tensor(7.0), "inner": moments}}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
    state = optimizer.state[parameter]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, moment in moments.items():
        assert state[name].equal(moment)


@pytest.mark.extras
def test_8_bit_has_the_same_settings() -> None:
    optimizer = make_optimizer(settings(optimizer="adamw8bit"), [nn.Parameter(torch.ones(3))], 1)
    (group,) = optimizer.param_groups
    found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert found == (PEAK, (0.7, 0.8), 0.3, 0.4)


def after_warm_up(curve: Callable[[float], float], steps: int = 20) -> Callable[[int], float]:
    """Return a rate by step: a straight line over 4 steps, then a curve over the rest."""
    return lambda k: PEAK * (k / 4 if k < 4 else curve((k - 4) / (steps - 4)))


SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: PEAK,
    "constant_with_warmup": after_warm_up(lambda _: 1.0),
    "linear": after_warm_up(lambda done: 1 - done),
    "cosine": after_warm_up(lambda done: (1 + math.cos(math.pi * done)) / 2),
    "cosine_with_restarts": after_warm_up(
        lambda done: (1 + math.cos(math.pi * (3 * done % 1))) / 2
    ),
    # diffusers' ends at a rate of 1e-7.
    "polynomial": after_warm_up(lambda done: (1 - 1e-7 / PEAK) * (1 - done) ** 2.5 + 1e-7 / PEAK),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_by_formula(name: Any) -> None:
    config = settings(lr_scheduler=name)
    optimizer = make_optimizer(config, [nn.Parameter(torch.ones(1))], 1)
    schedule = make_schedule(config, optimizer, 20)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(SCHEDULES[name](step), rel=1e-6)
        optimizer.step()
        schedule.step()


def test_a_new_rate_is_that_of_all_steps_from_then_on() -> None:
    config = settings(lr_scheduler="linear", lr_warmup_steps=0)
    optimizer = make_optimizer(config, [nn.Parameter(torch.ones(1))], 1)
    schedule = make_schedule(config, optimizer, 10)
    optimizer.step()
    for _ in range(4):
        schedule.step()
    assert set_learning_rate(schedule, 3.0) == pytest.approx((PEAK * 0.6, 3.0 * 0.6))
    for left in (0.6, 0.5, 0.4):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(3.0 * left)
        schedule.step()


def test_a_change_is_explained_by_the_options_that_changed(tmp_path: Path) -> None:
    before = {"learning_rate": 0.1, "lr_power": 2.5, "max_train_steps": 7, "lr_warmup_steps": 4}
    (tmp_path / "run.json").write_text(json.dumps({"config": before}))
    assert describe_change(settings(), tmp_path, 0.1, PEAK) == (
        f"{tmp_path.name}: the learning rate was 0.1 and is 0.02, because --learning-rate was 0.1 "
        "and is 0.02, --max-train-steps was 7 and is not given"
    )
