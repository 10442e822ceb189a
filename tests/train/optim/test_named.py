"""The optimisers that have a name, and the user's own: their steps, arguments and state."""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from train.config import TrainConfig
from train.optim import state_bytes as of_state
from train.optim.averaged_weights import averaged
from train.optim.fused_backward import FusedBackward
from train.optim.learning_rate import remarks
from train.optim.optimizer import check_optimizer, make_optimizer
from train.optim.state_bytes import state_bytes

extras = pytest.mark.extras
RATE = 0.125
HERE = __name__


class Plain(torch.optim.SGD):
    """An optimiser that a user might write."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, *, loud: bool = False):
        super().__init__(params, lr=lr, momentum=momentum)


class Moving(Plain):
    """One with another point than that which it trains, to which it goes, and back inexactly."""

    def eval(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data += 1.0

    def train(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.data -= 1.125


class NeedsNumbers(Plain):
    """One whose step looks at the gradient on the host."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["params"][0].grad.sum().item() > 0:
            super().step()


def settings(optimizer: str, *given: str, **changes: Any) -> TrainConfig:
    return TrainConfig(
        cache=("",),
        pretrained_model_name_or_path="",
        learning_rate=RATE,
        optimizer=optimizer,
        optimizer_args=given,
        **changes,
    )


def steps(optimizer: Any, weights: list[nn.Parameter], numbers: range) -> None:
    """Take steps with gradients that follow from their numbers."""
    for number in numbers:
        for place, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(10 * number + place)
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def two_weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


def after_steps(optimizer: Any, weights: list[nn.Parameter]) -> list[list[float]]:
    steps(optimizer, weights, range(1, 4))
    return [weight.flatten().tolist() for weight in weights]


def prodigy(weights: list[nn.Parameter]) -> Any:
    from prodigyopt import Prodigy

    return Prodigy(weights, lr=RATE, d_coef=2.0, weight_decay=0.5)


def adafactor(weights: list[nn.Parameter]) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(
        weights, lr=RATE, beta1=0.5, relative_step=False, scale_parameter=False, warmup_init=False
    )


def bitsandbytes_adamw(weights: list[nn.Parameter]) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


STOCK: list[Any] = [
    pytest.param("adamw8bit", (), bitsandbytes_adamw, marks=extras),
    ("adafactor", ("beta1=0.5",), adafactor),
    pytest.param("prodigy", ("d_coef=2", "weight_decay=0.5"), prodigy, marks=extras),
    (
        f"{HERE}:Plain",
        ("momentum = 0.5",),
        lambda weights: torch.optim.SGD(weights, lr=RATE, momentum=0.5),
    ),
]


@pytest.mark.parametrize(("name", "given", "stock"), STOCK)
def test_steps_are_those_of_the_library(
    name: str, given: tuple[str, ...], stock: Callable[[list[nn.Parameter]], Any]
) -> None:
    ours, theirs = two_weights(), two_weights()
    optimizer = make_optimizer(settings(name, *given), ours, 1)
    assert after_steps(optimizer, ours) == after_steps(stock(theirs), theirs)


@extras
def test_lion_by_hand() -> None:
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    given = ("betas=0.75,0.5", "weight_decay=0.25")
    optimizer = make_optimizer(settings("lion", *given), [weight], 1)
    expected, moment = [1.0, -2.0], [0.0, 0.0]
    for gradient in ([1.0, -3.0], [-8.0, 0.5], [2.0, 0.25]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        for place, slope in enumerate(gradient):
            direction = math.copysign(1, 0.75 * moment[place] + 0.25 * slope)
            expected[place] -= RATE * (direction + 0.25 * expected[place])
            moment[place] = 0.5 * moment[place] + 0.5 * slope
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_adafactor_by_hand() -> None:
    """Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4, with an absolute rate.

    In the first step the average is the gradient's square, here one of rank 1, which rows and
    columns describe exactly. So the update is the sign of the gradient, whose RMS of 1 is not
    clipped, and weights of 0 move as far as others.
    """
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.tensor([[1.0, -2.0], [3.0, 6.0]])
    make_optimizer(settings("adafactor"), [weight], 1).step()
    expected = [-RATE, RATE, -RATE, -RATE]
    assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@extras
def test_schedulefree_by_hand() -> None:
    """Defazio et al. 2024, arXiv:2405.15682, equations 8 to 10 with AdamW's scale."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    given = ("betas=(0.75, 0.5)", "weight_decay=0.25")
    optimizer = make_optimizer(settings("schedulefree", *given), [weight], 1)
    base, mean = [1.0, -2.0], [1.0, -2.0]
    trained, square = [1.0, -2.0], [0.0, 0.0]
    for number, gradient in enumerate(([1.0, -3.0], [-8.0, 0.5], [2.0, 0.25]), start=1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        for place, slope in enumerate(gradient):
            square[place] = 0.5 * square[place] + 0.5 * slope**2
            scale = math.sqrt(square[place] / (1 - 0.5**number)) + 1e-8
            base[place] -= RATE * (slope / scale + 0.25 * trained[place])
            mean[place] += (base[place] - mean[place]) / number
            trained[place] = 0.25 * base[place] + 0.75 * mean[place]
        assert weight.tolist() == pytest.approx(trained, rel=1e-5)
        with averaged(optimizer):
            assert weight.tolist() == pytest.approx(mean, rel=1e-5)


def test_the_trained_weights_are_put_back_as_they_were() -> None:
    weight = nn.Parameter(torch.tensor([2.125]))
    optimizer = make_optimizer(settings(f"{HERE}:Moving"), [weight], 1)
    assert weight.item() == 1.0
    with averaged(optimizer):
        assert weight.item() == 2.0
    assert weight.item() == 1.0


@extras
def test_the_average_costs_the_trained_weights_not_a_bit() -> None:
    weights, undisturbed = two_weights(), two_weights()
    optimizer = make_optimizer(settings("schedulefree"), weights, 1)
    other = make_optimizer(settings("schedulefree"), undisturbed, 1)
    for number in range(1, 6):
        steps(optimizer, weights, range(number, number + 1))
        steps(other, undisturbed, range(number, number + 1))
        with averaged(optimizer):
            saved = deepcopy(optimizer.state_dict())
            assert number == 1 or not torch.equal(weights[0], undisturbed[0])
        assert all(map(torch.equal, weights, undisturbed))
    again = two_weights()  # which a checkpoint's ControlNet, the average, would be loaded into
    resumed = make_optimizer(settings("schedulefree"), again, 1)
    resumed.load_state_dict(saved)
    assert all(map(torch.equal, again, undisturbed))
    steps(resumed, again, range(6, 8))
    steps(other, undisturbed, range(6, 8))
    assert all(map(torch.equal, again, undisturbed))


@extras
@pytest.mark.parametrize("name", ["lion", "prodigy", "schedulefree"])
def test_a_step_without_gradients_changes_nothing(name: str) -> None:
    weights = two_weights()
    optimizer = make_optimizer(settings(name), weights, 1)
    steps(optimizer, weights, range(1, 3))
    expected, groups = [one.clone() for one in weights], repr(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, weights, expected))
    assert repr(optimizer.state_dict()) == groups


@pytest.mark.parametrize("name", ["adafactor", pytest.param("lion", marks=extras)])
def test_stepping_within_the_backward_pass_is_the_same(name: str) -> None:
    found = []
    for fused in (False, True):
        weights = two_weights()
        optimizer = make_optimizer(settings(name), weights, 1)
        hooks = FusedBackward(optimizer) if fused else None
        for _ in range(3):
            sum((weight**2).sum() for weight in weights).backward()  # type: ignore[union-attr]
            if hooks is None:
                optimizer.step()
            optimizer.zero_grad()
        found.append([weight.tolist() for weight in weights])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["adafactor", pytest.param("lion", marks=extras)])
def test_weights_in_bfloat16_are_stepped_in_float32(name: str) -> None:
    """A step of 1/8 from 1 is no rounding's in 8 bits of mantissa."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    weight.grad = torch.ones(4, 4, dtype=torch.bfloat16)
    config = settings(name, bf16_weights=True, mixed_precision="bf16")
    optimizer = make_optimizer(config, [weight], 1)
    optimizer.step()
    assert weight.float().flatten().tolist() == pytest.approx([1 - RATE] * 16, rel=2**-7)
    tensors = [one for one in optimizer.state[weight].values() if isinstance(one, torch.Tensor)]
    assert {one.dtype for one in tensors} == {torch.float32}


REFUSED: list[tuple[str, tuple[str, ...], str]] = [
    ("sgd", (), "--optimizer sgd: none of adamw, adamw8bit, lion, adafactor, prodigy, schedulefr"),
    ("a b:C", (), "nor package.module:Class"),
    ("adafactor", ("beta1",), "--optimizer-args beta1: expected key=value"),
    ("adafactor", ("beta1=x",), "--optimizer-args beta1=x: expected a Python literal"),
    ("adafactor", ("beta1=1", "beta1=2"), "--optimizer-args beta1=2: beta1 is given twice"),
    ("adafactor", ("lr=3",), "--optimizer-args lr=3: give --learning-rate 3."),
    ("adafactor", ("betta=1",), "betta=1: unknown; --optimizer adafactor takes beta1, clip_thre"),
    ("adafactor", ("decay_rate='x'",), "decay_rate=x: --optimizer adafactor expects a number"),
    ("adafactor", ("warmup_init=1",), "--optimizer adafactor expects True or False."),
    ("adafactor", ("eps=1",), "expects 2 values as in (1e-30, 0.001)."),
    ("adafactor", ("relative_step=True",), "cannot be made: Cannot combine manual `lr`"),
    ("adamw", ("betas=0.9,0.99",), "--optimizer-args betas=…: give --adam-beta1 and --adam-beta2."),
    ("adamw", ("foreach=True",), "--optimizer-args foreach=True and a learning rate of 1 cannot"),
    ("nowhere.at_all:Class", (), "nowhere.at_all cannot be imported (ModuleNotFoundError: No mod"),
    (f"{HERE}:Absent", (), f"{HERE} has no Absent."),
    (f"{HERE}:two_weights", (), "two_weights is no subclass of torch.optim.Optimizer."),
    (f"{HERE}:Plain", ("nesterov=True",), "takes loud, momentum."),
    (f"{HERE}:Plain", ("momentum=-1",), "cannot be made: Invalid momentum value: -1"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_what_is_wrong_is_said_in_a_line(name: str, given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_optimizer(settings(name, *given))
    assert len(str(caught.value).splitlines()) == 1


FREE = "schedulefree"
APART: list[tuple[str, dict[str, Any], str]] = [
    ("lion", {"adam_beta2": 0.95}, "--adam-beta2 0.95: is AdamW's; what --optimizer lion takes"),
    ("lion", {"adam_epsilon": 1e-6}, "with --optimizer-args eps=…. Leave it out; where a file"),
    ("prodigy", {"bf16_weights": True}, "--bf16-weights: steps one weight after the other"),
    ("prodigy", {"fused_backward_pass": True, "max_grad_norm": 0.0}, "--fused-backward-pass: ste"),
    (f"{HERE}:Plain", {"offload_optimizer": True}, "--offload-optimizer: steps one weight"),
    (FREE, {"ema_decay": 0.9}, "--ema-decay 0.9: --optimizer schedulefree saves an average"),
    (FREE, {"lr_scheduler": "cosine"}, "--lr-scheduler cosine: --optimizer schedulefree takes"),
]


@pytest.mark.parametrize(("name", "changes", "message"), APART)
def test_what_does_not_go_together_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(name, **changes)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name, extra in (("lion", "bitsandbytes"), ("prodigy", "prodigy"), (FREE, FREE)):
        with pytest.raises(ConfigError, match=re.escape(f"pip install '.[{extra}]'")):
            check_optimizer(settings(name))


def test_prodigys_rate_is_1() -> None:
    assert [line[:21] for line in remarks(settings("prodigy"), 9)] == ["--learning-rate 0.125"]
    assert not list(remarks(replace(settings("prodigy"), learning_rate=1.0), 9))


STATES: list[Any] = [
    ("adamw", ()),
    ("adamw", ("amsgrad=True",)),
    ("adafactor", ()),
    ("adafactor", ("beta1=0.9",)),
    (f"{HERE}:Plain", ()),
    (f"{HERE}:Plain", ("momentum=0.9",)),
    *(
        pytest.param(*state, marks=extras)
        for state in (
            ("adamw8bit", ()),
            ("lion", ()),
            ("lion", ("optim_bits=8",)),
            ("prodigy", ()),
            ("prodigy", ("slice_p=11",)),
            ("prodigy", ("betas=(0, 0.99)",)),
            ("schedulefree", ()),
        )
    ),
]


@pytest.mark.parametrize(("name", "given"), STATES)
@pytest.mark.parametrize("shape", [(7, 9, 11), (64, 100), (70,)])
def test_state_takes_the_bytes_that_are_estimated(
    name: str, given: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    config, weight = settings(name, *given), nn.Parameter(torch.ones(shape))
    optimizer = make_optimizer(config, [weight], 1)
    steps(optimizer, [weight], range(1, 3))
    # Single numbers, and the one table that all weights of bitsandbytes share, are left out.
    found = sum(
        tensor.nbytes
        for key, tensor in optimizer.state[weight].items()
        if isinstance(tensor, torch.Tensor) and tensor.ndim and not key.startswith("qmap")
    )
    assert state_bytes(config, weight.shape) == found


def test_state_that_only_numbers_tell_is_said_to_be_unknown() -> None:
    of_state._simulated.cache_clear()
    with pytest.raises(ConfigError, match="how much memory its state takes is not known"):
        state_bytes(settings(f"{HERE}:NeedsNumbers"), torch.Size([3]))
