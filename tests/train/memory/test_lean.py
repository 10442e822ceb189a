"""Options that save memory or time and must not change what is learnt."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.reference.runs import logged_losses
from common.errors import ConfigError
from sd3.quantized import RowLinear, quantize
from tests.conftest import Outcome, Spoil, flags, four_steps
from tests.train.memory.late_copies import make_copies_late
from tests.train.optim.host_elsewhere import copy_on_the_way
from tests.train.test_faults import second_is_nan
from tests.train.test_run import same, weights
from train import models
from train.config import TrainConfig
from train.memory import activation_offload
from train.optim import fused_backward, host_memory, offloaded_state
from train.optim.host_memory import HostMemory
from train.optim.offloaded_state import OffloadedState
from train.optim.stochastic_rounding import StochasticRounding, round_stochastically
from train.run import train


def every_loss(config: TrainConfig) -> TrainConfig:
    """Return settings with every step's loss, and no clipping."""
    return replace(config, max_grad_norm=0.0, logging_steps=1, report_to="tensorboard")


@pytest.fixture
def unclipped(train_config: TrainConfig) -> TrainConfig:
    return every_loss(train_config)


@pytest.fixture
def small_tensors_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offload the miniature's small tensors too, and make each way to the device a copy."""
    copy_on_the_way(monkeypatch)
    monkeypatch.setattr(offloaded_state, "MIN_OFFLOADED_NUMBERS", 64)
    monkeypatch.setattr(activation_offload, "MIN_OFFLOADED_BYTES", 64)


SAME_BITS: list[dict[str, Any]] = [
    {"fused_backward_pass": True},
    {"offload_optimizer": True},
    {"offload_activations": True},
    {"offload_activations": True, "checkpointing": "selective"},
    {"offload_activations": True, "checkpointing": "full"},
    {"offload_optimizer": True, "fused_backward_pass": True, "checkpointing": "full"},
    {"offload_base": 4},
    {"offload_base": 4, "checkpointing": "selective"},
    {"offload_base": 3, "offload_activations": True, "checkpointing": "full"},
]


@pytest.fixture(scope="module")
def plain(base: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with none of these options."""
    folder = tmp_path_factory.mktemp("plain")
    train(every_loss(four_steps(base, cache, folder)))
    return folder


@pytest.mark.usefixtures("small_tensors_offloaded")
@pytest.mark.parametrize("settings", SAME_BITS)
def test_what_only_moves_numbers_gives_the_same_bits(
    settings: dict[str, Any], unclipped: TrainConfig, plain: Path
) -> None:
    other = replace(unclipped, **settings)
    train(other)
    assert logged_losses(other.output_dir) == logged_losses(plain)
    assert same(other.output_dir, plain)


ALL = [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("one_by_one", "orders"),
    [
        (False, [ALL] * 4),
        (True, [ALL] * 4),
        (False, [ALL, [0], [0], ALL, [0, 1, 3], ALL]),
        (True, [ALL, [0], [0], ALL, [0, 1, 3], ALL]),
        (True, [ALL, [0, 2, 1, 3, 4], [0, 2, 1, 3, 4], ALL[::-1], ALL]),
    ],
    ids=["all at once", "one by one", "some have no gradient", "or do not step", "in any order"],
)
def test_state_is_there_when_its_weight_steps_and_on_the_host_when_it_is_saved(
    one_by_one: bool,
    orders: list[list[int]],
    small_tensors_offloaded: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With copies as late as they may be, in both directions."""
    make_copies_late(monkeypatch, offloaded_state)
    kind: Any = type("Adam", (OffloadedState, torch.optim.AdamW), {})
    torch.manual_seed(0)
    start = [torch.randn(count) for count in (100, 8, 200, 300, 100)]
    results = []
    for chosen in (torch.optim.AdamW, kind):
        weights = [nn.Parameter(one.clone()) for one in start]
        adam = chosen(weights, fused=True, lr=0.1)
        torch.manual_seed(1)
        for order in orders:
            gradients = [torch.randn_like(one) for one in weights]
            for number in order:
                weights[number].grad = gradients[number]
                if one_by_one:
                    adam.step()
                    weights[number].grad = None
            if not one_by_one:
                adam.step()
                adam.zero_grad()
        saved = adam.state_dict()["state"]
        moments = [saved[number][name] for number in saved for name in ("exp_avg", "exp_avg_sq")]
        results.append([*(one.detach() for one in weights), *moments])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_state_that_came_ahead_is_forgotten_when_other_state_is_loaded(
    small_tensors_offloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight without a gradient leaves its state on the device, fetched ahead."""
    make_copies_late(monkeypatch, offloaded_state)
    kind: Any = type("Adam", (OffloadedState, torch.optim.AdamW), {})
    results = []
    for chosen in (torch.optim.AdamW, kind):
        torch.manual_seed(0)
        one, two = (nn.Parameter(torch.randn(100)) for _ in range(2))
        adam = chosen([one, two], fused=True, lr=0.1)

        def step(*weights: Tensor, adam: Any = adam) -> None:
            adam.zero_grad()
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            adam.step()

        step(one, two)
        saved = copy.deepcopy(adam.state_dict())
        step(one, two)
        step(one)
        adam.load_state_dict(saved)
        step(two)
        results.append(two.detach())
    assert torch.equal(*results)


def test_the_next_state_comes_while_a_weight_steps(
    small_tensors_offloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [nn.Parameter(torch.ones(count)) for count in (100, 200, 300)]
    events: list[str] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            events.append(f"step {self.param_groups[0]['params'][0].numel()}")
            super().step(closure)

    class Recorded(host_memory.CopyStream):
        def copy(self, pairs: Any) -> Any:
            pairs = list(pairs)
            events.extend(f"copy {target.numel()}" for target, _ in pairs[:1])
            return super().copy(pairs)

    monkeypatch.setattr(offloaded_state, "CopyStream", Recorded)
    kind: Any = type("Adam", (OffloadedState, Watched), {})
    adam = kind(weights, fused=True)

    def events_of(*numbers: int) -> list[str]:
        """Return what happens while weights step one by one."""
        events.clear()
        for number in numbers:
            weights[number].grad = torch.ones_like(weights[number])
            adam.step()
            weights[number].grad = None
        return events

    events_of(0, 1, 2)
    assert events_of(0, 1, 2) == [
        *("copy 100", "copy 200", "step 100", "copy 100"),
        *("copy 300", "step 200", "copy 200"),
        *("step 300", "copy 300"),
    ]
    # In another order, what has stepped does not come again, to lie there until the next step.
    assert events_of(0, 2, 1).count("copy 300") == 2
    assert not adam._arriving
    assert events_of(0, 2, 1) == [
        *("copy 100", "copy 300", "step 100", "copy 100"),
        *("copy 200", "step 300", "copy 300"),
        *("step 200", "copy 200"),
    ]
    # Here 300 comes in vain, and goes with the last weight.
    events_of(0, 1)
    assert not adam._arriving


def test_host_memory_is_taken_in_large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PIECE_BYTES", 1024)
    memory, cpu = HostMemory(), torch.device("cpu")
    homes = [memory.empty_like(torch.zeros(100), cpu) for _ in range(3)]
    large = memory.empty_like(torch.zeros(30, 20), cpu)
    starts = [home.untyped_storage().data_ptr() for home in homes]
    assert starts[0] == starts[1] != starts[2]
    assert homes[1].data_ptr() - homes[0].data_ptr() == 4 * 128  # 100, to a multiple of 64
    assert large.shape == (30, 20)
    assert large.untyped_storage().nbytes() == 2400


@pytest.mark.extras
@pytest.mark.usefixtures("small_tensors_offloaded")
def test_state_in_8_bit_goes_on_from_host_memory(
    unclipped: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(
        unclipped, lr_scheduler="constant", optimizer="adamw8bit", offload_optimizer=True
    )
    train(whole)
    halves = replace(whole, output_dir=tmp_path / "halves", resume_from_checkpoint="latest")
    train(replace(halves, max_train_steps=2))
    train(halves)
    assert f"resuming {halves.output_dir}/checkpoint-2" in capsys.readouterr().out
    assert same(halves.output_dir, whole.output_dir)


@pytest.mark.usefixtures("small_tensors_offloaded")
@pytest.mark.parametrize(
    "option",
    ["fused_backward_pass", pytest.param("offload_optimizer", marks=pytest.mark.slow)],
)
def test_checkpoints_go_on_with_and_without(
    option: str, unclipped: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replace(unclipped, lr_scheduler="constant")
    train(whole)
    for first, second in ((True, False), (False, True)):
        halves = replace(whole, output_dir=tmp_path / f"{first}", resume_from_checkpoint="latest")
        train(replace(halves, max_train_steps=2, **{option: first}))
        train(replace(halves, max_train_steps=4, **{option: second}))
        # From the beginning it would be the same weights as well.
        assert f"resuming {halves.output_dir}/checkpoint-2" in capsys.readouterr().out
        assert same(halves.output_dir, whole.output_dir)


def test_what_is_offloaded_is_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[tuple[str, str]] = []

    def noted(_: Any, pairs: Any) -> None:
        """Note instead of copying: tensors without numbers have none, and need no CUDA."""
        for target, source in pairs:
            assert (target.shape, target.dtype) == (source.shape, source.dtype)
            ways.append((source.device.type, target.device.type))

    monkeypatch.setattr(host_memory.CopyStream, "copy", noted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        large, small = (nn.Parameter(torch.empty(count, device="cuda")) for count in (8192, 16))
        kind: Any = type("Adam", (OffloadedState, torch.optim.AdamW), {})
        adam = kind([large, small], fused=True)
        for _ in range(2):
            large.grad, small.grad = torch.empty_like(large), torch.empty_like(small)
            ways.clear()
            adam.step()
            assert adam.state[large]["exp_avg"].device.type == "cpu"
            assert adam.state[large]["exp_avg_sq"].device.type == "cpu"
            assert adam.state[small]["exp_avg"].device.type == "cuda"
        # Two moments of the one weight come, and go again.
        assert ways == [("cpu", "cuda")] * 2 + [("cuda", "cpu")] * 2
        moved: list[str] = []
        to = Tensor.to

        def watched(self: Tensor, device: Any, **more: Any) -> Tensor:
            moved.append(f"{self.numel()} to {torch.device(device).type}")
            return to(self, device, **more)

        state = adam.state_dict()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Tensor, "to", watched)
            adam.load_state_dict(state)
        assert adam.state[large]["exp_avg"].device.type == "cpu"
        assert adam.state[small]["exp_avg"].device.type == "cuda"
        # Not for a moment is a large one on the device.
        assert not any(one.startswith("8192") for one in moved)


def test_activations_go_to_the_host_and_weights_stay(small_tensors_offloaded: None) -> None:
    layer = nn.Linear(8, 8)
    inputs = torch.randn(8, 8, requires_grad=True)
    offload = activation_offload.OffloadedActivations(layer)
    with offload:
        outputs = layer(inputs.exp()).square()
    node: Any = outputs.grad_fn
    kept: list[Tensor] = [node._saved_self, node.next_functions[0][0]._saved_mat1]
    assert kept[0].data_ptr() != kept[1].data_ptr()
    for tensor in (layer.weight, layer.weight.t(), torch.zeros(2)):
        assert offload.pack_hook(tensor) is tensor
    packed = offload.pack_hook(inputs)
    assert not isinstance(packed, Tensor)
    assert packed.host.data_ptr() != inputs.data_ptr()
    assert offload.unpack_hook(packed).equal(inputs)


def test_activations_are_back_in_time(
    small_tensors_offloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies as late as they may be, in both directions."""
    make_copies_late(monkeypatch, activation_offload)
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(8)))
    offload = activation_offload.OffloadedActivations(layers)
    for _ in range(2):
        inputs = torch.randn(8, 8, requires_grad=True)
        (expected,) = torch.autograd.grad(layers(inputs).square().sum(), inputs)
        with offload:
            loss = layers(inputs).square().sum()
        (found,) = torch.autograd.grad(loss, inputs)
        assert found.equal(expected)


def test_bfloat16_is_rounded_to_the_mean() -> None:
    torch.manual_seed(0)
    # Between 1 and 1 + 2**-7, the next bfloat16, a quarter of the way.
    exact = torch.tensor([1 + 2**-9, -1 - 2**-9, 1.0, math.inf, -math.inf, math.nan, math.nan])
    exact[6:].view(torch.int32).fill_(0x7FFFFFFF)  # CUDA's NaN, to which nothing can be added
    found = round_stochastically(exact.repeat(100_000, 1)).float()
    above = (found[:, 0] == 1 + 2**-7).float().mean()
    assert set(found[:, 0].tolist()) == {1.0, 1 + 2**-7}
    assert set(found[:, 1].tolist()) == {-1.0, -1 - 2**-7}
    # The deviation of this mean is 0.0014.
    assert above == pytest.approx(0.25, abs=0.006)
    assert (found[:, 2:5] == exact[2:5]).all()
    assert found[:, 5:].isnan().all()


def test_small_updates_do_not_vanish_in_bfloat16() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    kind: Any = type("Adam", (StochasticRounding, torch.optim.AdamW), {})
    adam = kind([parameter], fused=True, lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        parameter.grad = torch.ones_like(parameter)
        adam.step()
    assert parameter.dtype == torch.bfloat16
    assert adam.state[parameter]["exp_avg_sq"].dtype == torch.float32
    # AdamW's step is its rate where the gradient stays the same; to the nearest, 1 would stay 1.
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 10 * 1e-4, abs=5e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param(
            {"offload_optimizer": True, "fused_backward_pass": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_training_in_bfloat16_weights(
    more: dict[str, Any], unclipped: TrainConfig, tmp_path: Path
) -> None:
    exact = replace(unclipped, mixed_precision="bf16", lr_scheduler="constant")
    train(exact)
    rounded = replace(exact, output_dir=tmp_path / "rounded", bf16_weights=True, **more)
    train(rounded)
    assert logged_losses(rounded.output_dir) == pytest.approx(
        logged_losses(exact.output_dir), rel=0.02
    )
    found = weights(rounded.output_dir)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    # A checkpoint goes on to the same bits, rounding included.
    halves = replace(rounded, output_dir=tmp_path / "halves", resume_from_checkpoint="latest")
    train(replace(halves, max_train_steps=2))
    train(halves)
    assert same(halves.output_dir, rounded.output_dir)


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
    assert not fused.pop_nonfinite()
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
    without_effect = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
    assert changed <= {f"transformer_blocks.1.{name}" for name in without_effect}
    assert not same(two, three)
    assert "step 2: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "more", "message"),
    [
        ({"max_grad_norm": 1.0}, {}, "--max-grad-norm 1 clips the norm of all"),
        ({"gradient_accumulation_steps": 2}, {}, "--gradient-accumulation-steps keeps"),
        ({"mixed_precision": "fp16"}, {}, "--mixed-precision fp16 looks at all"),
        ({}, {"num_processes": 2}, "several processes exchange theirs first"),
        ({}, {"scales_loss": True}, "--mixed-precision fp16 looks at all"),
    ],
)
def test_what_needs_all_gradients_is_refused(
    unclipped: TrainConfig, settings: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    def check(settings: dict[str, Any], more: dict[str, Any], *, fused: bool = True) -> None:
        replace(unclipped, fused_backward_pass=fused, **settings)
        fused_backward.check(**({"num_processes": 1, "scales_loss": False} | more))

    check({}, {})
    check(settings, {}, fused=False)
    with pytest.raises(ConfigError, match=f"^--fused-backward-pass: {message}"):
        check(settings, more)


@pytest.mark.parametrize("more", [(), ("--estimate",)])
def test_clipping_and_steps_in_the_backward_pass_end_in_one_line(
    more: tuple[str, ...], train_config: TrainConfig, command: Callable[..., Outcome]
) -> None:
    outcome = command("train", *flags(train_config), "--fused-backward-pass", *more)
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
        ("int8", lambda weight: rounded_rows(weight, 127), 0.02),
        ("fp8", rounded_to_fp8, 0.04),
        pytest.param("nf4", rounded_to_nf4, 0.15, marks=pytest.mark.extras),
    ],
)
def test_quantised_layers_compute_with_rounded_weights(
    kind: str, rounded: Callable[[Tensor], Tensor], error: float, base: Path
) -> None:
    exact = models.load_transformer(base, None, torch.float32)
    transformer = models.load_transformer(base, None, torch.float32)
    quantize(transformer, kind)
    transformer.to("cpu")
    assert transformer.dtype == torch.float32
    plain = exact.transformer_blocks[0].ff.net[2]
    layer = transformer.transformer_blocks[0].ff.net[2]
    inputs = torch.randn(3, plain.in_features, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: saved.append(one) or one, lambda one: one
    ):
        found = layer(inputs)
    assert all(one.numel() < plain.weight.numel() for one in saved)
    expected = nn.functional.linear(inputs, rounded(plain.weight.detach()), plain.bias)
    assert (found - expected).norm() < 2e-3 * (expected - plain.bias).norm()
    away = (found - plain(inputs)).norm() / (plain(inputs) - plain.bias).norm()
    assert 1e-3 < away < error
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    (right,) = torch.autograd.grad(expected.sum(), inputs)
    assert (gradient - right).norm() < 2e-3 * right.norm()


def test_products_in_float16_do_not_overflow() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 64).requires_grad_(False)
    layer = RowLinear(plain, torch.float8_e4m3fn)
    layer.bias = nn.Parameter(plain.bias.half(), requires_grad=False)
    inputs = 100 * torch.randn(64, 512)
    found = layer(inputs.half()).float()
    assert (found - plain(inputs)).norm() < 0.04 * plain(inputs).norm()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("int8", 0.01), ("fp8", 0.03), pytest.param("nf4", 0.1, marks=pytest.mark.extras)],
)
def test_training_beside_a_quantised_base(
    kind: str, error: float, unclipped: TrainConfig, tmp_path: Path
) -> None:
    train(unclipped)
    config = replace(unclipped, output_dir=tmp_path / kind, quantize_base=kind)
    train(config)
    exact, found = logged_losses(unclipped.output_dir), logged_losses(config.output_dir)
    assert found != exact
    assert found == pytest.approx(exact, rel=error)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(
    unclipped: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated; what machine code computes is held in test_processes.py."""
    backend = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", backend)
    train(unclipped)
    config = replace(
        unclipped, output_dir=tmp_path / "compiled", compile=True, checkpointing="full"
    )
    train(config)
    assert logged_losses(config.output_dir) == pytest.approx(
        logged_losses(unclipped.output_dir), rel=1e-4
    )
