"""Estimates of a run's memory, compared with what it takes."""

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bases import TRANSFORMERS, VAE
from common.config_file import read_section
from common.errors import ConfigError
from common.memory.meter import Meter
from sd3.pretrained import read_config
from tests.conftest import Outcome, flags
from tests.train.memory.steps import batches_and_guard
from train import loop, models
from train.assembly import assemble
from train.config import TrainConfig
from train.memory import activation_offload, estimate
from train.memory.estimate import find_sizes, remedies
from train.memory.simulation import simulate
from train.optim.host_memory import HostMemory


def taken(config: TrainConfig) -> int:
    """Return the bytes that a run's second step takes beside weights and optimiser's state."""
    run = assemble(config)
    batches, guard = batches_and_guard(run)
    loop.take_step(run, batches, guard, 1)
    gc.collect()  # what earlier tests have left would be freed, and counted, in the midst of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loop.take_step(run, batches, guard, 2)
    batches.close()
    events: Any = found.profiler
    memory = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


BF16 = {"mixed_precision": "bf16"}
FUSED = {"fused_backward_pass": True, "checkpointing": "full"}


@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({}, 0.01),
        ({"quantize_base": "int8"}, 0.01),
        *(
            pytest.param({"optimizer": name, "lr_scheduler": "constant"}, 0.01, marks=marks)
            for name, marks in (
                ("adafactor", pytest.mark.slow),
                ("schedulefree", [pytest.mark.slow, pytest.mark.extras]),
                ("prodigy", [pytest.mark.slow, pytest.mark.extras]),
            )
        ),
        *(
            pytest.param(*slow, marks=pytest.mark.slow)
            for slow in (
                ({"checkpointing": "selective"}, 0.01),
                # The CPU's attention has a temporary of its own in its backward pass in 16 bit.
                (BF16 | FUSED | {"bf16_weights": True}, 0.02),
                ({"checkpointing": "controlnet"}, 0.01),
                ({"checkpointing": "full"}, 0.01),
                ({"train_batch_size": 4}, 0.01),
                ({"quantize_base": "fp8"}, 0.01),
                (FUSED, 0.01),
                (BF16, 0.01),
                (BF16 | FUSED, 0.02),
                (BF16 | FUSED | {"checkpointing": "selective"}, 0.02),
            )
        ),
    ],
)
def test_a_step_takes_as_much_as_estimated(
    settings: dict[str, Any], within: float, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, **settings)
    step = simulate(config, find_sizes(config)).step
    assert step["gradients"] + step["activations"] == pytest.approx(taken(config), rel=within)


class Device(TorchDispatchMode):
    """Counts what is on a device that the CPU stands in for: all but what is in host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._sizes.pop, storage._cdata)

    def leave_out(self, tensor: torch.Tensor) -> None:
        self.count(tensor)
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Before the next operation: what was made in host memory is left out by then.
        self.peak = max(self.peak, sum(self._sizes.values()))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result


ALL = {
    **{"offload_base": 6, "offload_optimizer": True, "offload_activations": True},
    **{"quantize_base": "int8", "bf16_weights": True, "mixed_precision": "bf16"},
    **{"fused_backward_pass": True, "checkpointing": "full"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"offload_base": 6},
        {"offload_optimizer": True},
        {"offload_activations": True},
        {"offload_activations": True, "checkpointing": "selective"},
        {"offload_activations": True, "checkpointing": "full"},
        ALL,
    ],
    ids=lambda settings: " ".join(settings),
)
def test_all_that_a_run_takes_is_as_estimated(
    settings: dict[str, Any], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, state, gradients and activations of a step together, with real tensors."""
    config = replace(config, **settings)
    device = Device()
    empty_like, on_host = HostMemory.empty_like, activation_offload.OnHost.__init__

    def in_host_memory(self: Any, tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
        host = empty_like(self, tensor, where)
        device.leave_out(host)
        return host

    def activation_on_host(self: Any, number: int, host: torch.Tensor) -> None:
        device.leave_out(host)
        on_host(self, number, host)

    monkeypatch.setattr(HostMemory, "empty_like", in_host_memory)
    monkeypatch.setattr(activation_offload.OnHost, "__init__", activation_on_host)
    run = assemble(config)
    batches, guard = batches_and_guard(run)
    loop.take_step(run, batches, guard, 1)
    for network in (run.transformer, run.controlnet):
        for tensor in (*network.parameters(), *network.buffers()):
            device.count(tensor)
    for state in run.optimizer.optimizer.state.values():
        for value in state.values():
            device.count(value)
    with device:
        loop.take_step(run, batches, guard, 2)
    batches.close()
    assert simulate(config, find_sizes(config)).peak == pytest.approx(device.peak, rel=0.03)


@pytest.mark.slow
def test_weights_and_state_are_counted_one_by_one(config: TrainConfig) -> None:
    run = assemble(config)
    sizes = find_sizes(config)
    buffers = sum(one.nbytes for one in run.controlnet.buffers())
    frozen = sum(one.numel() for one in run.controlnet.parameters() if not one.requires_grad)
    linear = [
        layer
        for layer in run.transformer.transformer_blocks.modules()
        if isinstance(layer, nn.Linear)
    ]
    whole = sum(one.nbytes for one in (*run.transformer.parameters(), *run.transformer.buffers()))
    inside = sum(layer.weight.numel() for layer in linear)
    rows = sum(layer.out_features for layer in linear)

    exact = simulate(replace(config, ema_decay=0.9), sizes).step
    assert exact["frozen base"] == whole
    assert exact["ControlNet"] == 4 * (run.num_trained + frozen) + buffers
    assert exact["optimiser"] == 8 * run.num_trained
    assert exact["average"] == 4 * run.num_trained

    int8 = simulate(replace(config, quantize_base="int8"), sizes).step
    assert int8["frozen base"] == whole - 4 * inside + inside + 4 * rows
    nf4 = simulate(replace(config, quantize_base="nf4"), sizes).step
    # Half a byte a weight and, for 64 of them, one byte and the 256th part of four.
    packed = inside / 2 + inside / 64 + inside / (64 * 256) * 4
    assert nf4["frozen base"] == pytest.approx(whole - 4 * inside + packed, rel=1e-3)

    lean = replace(config, bf16_weights=True, mixed_precision="bf16", offload_optimizer=True)
    found = simulate(lean, sizes)
    small = [one.numel() for one in run.controlnet.parameters() if one.numel() < 4096]
    assert found.step["ControlNet"] == 2 * (run.num_trained + frozen) + buffers // 2
    assert found.step["optimiser"] < 8 * sum(small)
    assert found.step["optimiser"] + found.host == 8 * run.num_trained


@pytest.mark.extras
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_state_in_8_bit_and_weights_in_less_take_what_the_libraries_make_of_them(
    kind: str, config: TrainConfig
) -> None:
    config = replace(config, optimizer="adamw8bit", quantize_base=kind)
    run = assemble(config)
    for parameter in run.controlnet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    # Each has the table of 256 numbers of its format; they share it.
    state = sum(
        tensor.nbytes
        for tensors in run.optimizer.optimizer.state.values()
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not name.startswith("qmap")
    )
    said = simulate(config, find_sizes(config)).step
    assert said["optimiser"] == pytest.approx(state, rel=0.01)
    if kind == "nf4":
        packed = sum(
            one.nbytes for one in (*run.transformer.parameters(), *run.transformer.buffers())
        )
        for parameter in run.transformer.parameters():
            if hasattr(parameter, "quant_state"):
                scales = parameter.quant_state
                packed += scales.absmax.nbytes + scales.state2.absmax.nbytes
        assert said["frozen base"] == pytest.approx(packed, rel=0.001)


def test_the_meter_counts_arithmetic() -> None:
    meter = Meter()
    with meter:
        one = torch.zeros(1000)
        meter.count(one, "weights")
        two = torch.zeros(500)
        three = one + 1
        view = three[:10]
        assert meter.now == {"weights": 4000, "activations": 6000}
        del two, three
        assert meter.now == {"weights": 4000, "activations": 4000}
        del view
        assert meter.now == {"weights": 4000, "activations": 0}
        assert meter.peak == {"weights": 4000, "activations": 6000}
        meter.reset_peak()
        assert meter.peak == {"weights": 4000, "activations": 0}


@pytest.mark.slow
def test_the_average_of_an_optimiser_takes_the_place_of_the_weights_in_validation(
    config: TrainConfig,
) -> None:
    """They are kept meanwhile. All else is as large: both optimisers have 8 bytes a weight."""
    config = replace(config, lr_scheduler="constant", num_validation_images=1)
    sizes = replace(find_sizes(config), validates=True)
    plain = simulate(config, sizes).validation
    trained = simulate(config, sizes).step["optimiser"] // 2
    assert simulate(replace(config, optimizer="schedulefree"), sizes).validation == plain + trained


def test_arguments_are_checked_for_an_estimate_too(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="slice=3: unknown; --optimizer adafactor takes"):
        find_sizes(replace(config, optimizer="adafactor", optimizer_args=("slice=3",)))


@pytest.mark.slow
def test_validation_counts_drawing_and_decoding(config: TrainConfig) -> None:
    sizes = replace(find_sizes(config), validates=True)
    few = simulate(replace(config, num_validation_images=1), sizes).validation
    many = simulate(replace(config, num_validation_images=16), sizes).validation
    assert few < many
    decoded = simulate(config, replace(sizes, vae=dict(vae_config(config)))).validation
    # An RGB picture in float32 is the least that decoding keeps.
    assert decoded > few + 3 * 256 * 256 * 4


@pytest.mark.slow
def test_validation_counts_held_out_batches_that_are_larger_than_a_steps(
    config: TrainConfig,
) -> None:
    sizes = replace(find_sizes(config), validates=False, measures_held_out=True)
    assert simulate(config, sizes).validation == 0  # a step of that size takes more
    large = simulate(replace(config, validation_batch_size=64), sizes)
    # The latents of 64 pictures, with their noise, in float32.
    assert large.validation > sum(large.step.values()) + 64 * 2 * 16 * 32 * 32 * 4


def vae_config(config: TrainConfig) -> dict[str, Any]:
    return read_config(Path(config.pretrained_model_name_or_path), "vae")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only try some of the remedies."""
    monkeypatch.setattr(estimate, "REMEDIES", ({"optimizer": "adamw8bit"},))


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_an_estimate_needs_no_weights(
    config: TrainConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    for name in ("transformer", "vae"):
        (bare / name).mkdir(parents=True)
        source = Path(config.pretrained_model_name_or_path) / name / "config.json"
        shutil.copy(source, bare / name)
    bare_config = replace(config, pretrained_model_name_or_path=str(bare), estimate=True)
    outcome = command("train", *flags(bare_config))
    assert outcome.exit_code == 0
    lines = [line.strip() for line in outcome.output.splitlines()]
    assert lines[0] == "memory of one device, nothing shared out, 2 x 256 x 256 px a batch, in GB:"
    end = next(k for k, line in enumerate(lines) if line.endswith("a step at its fullest"))
    *parts, whole, free, loading = [float(line.split("  ")[0]) for line in lines[1 : end + 3]]
    assert sum(parts) == pytest.approx(whole, abs=0.03)
    # An allocator's gaps, and CUDA's own share.
    assert free == pytest.approx(1.05 * whole + 0.5, abs=0.03)
    assert 0 < loading < whole
    assert "must be free" in lines[end + 1]
    assert any(line.endswith("--checkpointing full") for line in lines)
    assert not config.output_dir.exists()


def without_cache(config: TrainConfig, resolution: int, tokens: int) -> TrainConfig:
    return replace(
        config, cache=(), estimate=True, resolution=resolution, max_sequence_length=tokens
    )


@pytest.mark.slow
def test_an_estimate_without_a_cache_is_the_same(config: TrainConfig) -> None:
    planned = without_cache(config, 256, 24)
    assert find_sizes(planned) == find_sizes(config)
    validating = replace(planned, validation_steps=5, resolution=128)
    sizes = find_sizes(validating)
    assert (sizes.latent, sizes.validates) == ((16, 16), True)
    assert sizes.vae == vae_config(config)
    assert estimate.need(validating, None).device < estimate.need(planned, 10**9).device


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": (), "estimate": True}, "--estimate: needs --cache, or --resolution"),
        ({"cache": (), "estimate": True, "resolution": 1000}, "--resolution 1000: must be div"),
        ({"estimate": True, "resolution": 64}, "--resolution 64: --cache .* says it"),
        ({"resolution": 64}, "--resolution: belongs to python -m precompute"),
        ({"max_sequence_length": 77}, "--max-sequence-length: belongs to python -m precompute"),
        (
            {"cache": (), "estimate": True, "resolution": 64, "max_sequence_length": 0},
            "--max-sequence-length 0: must be 1 to 512",
        ),
    ],
)
def test_what_describes_a_cache_is_for_estimates_without_one(
    settings: dict[str, Any], message: str, config: TrainConfig
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **settings)


def test_an_estimate_names_a_picture_that_is_too_large(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"--resolution 8192: .* has positions for \d+ px"):
        find_sizes(without_cache(config, 8192, 77))


@pytest.mark.slow
def test_host_memory_is_that_of_the_networks_or_of_what_is_offloaded(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has left the host, if it leaves it, when the ControlNet is loaded."""
    loaded: list[str] = []
    for name in ("load_transformer", "new_controlnet"):
        load = getattr(models, name)

        def noted(*args: Any, name: str = name, load: Any = load) -> Any:
            loaded.append(name)
            return load(*args)

        monkeypatch.setattr(models, name, noted)
    run = assemble(replace(config, mixed_precision="bf16"))
    assert loaded == ["load_transformer", "new_controlnet"]
    base, controlnet = (
        sum(one.nbytes for one in (*network.parameters(), *network.buffers()))
        for network in (run.transformer, run.controlnet)
    )
    planned = replace(without_cache(config, 256, 24), mixed_precision="bf16")
    assert base < controlnet == estimate.need(planned, None).host
    exact = replace(planned, mixed_precision="no")
    assert controlnet < 2 * base == estimate.need(exact, None).host
    sizes = find_sizes(planned)
    streamed = simulate(replace(planned, offload_base=3), sizes)
    assert streamed.need.host == streamed.loading == controlnet + streamed.host
    state = simulate(replace(planned, offload_optimizer=True), sizes)
    assert state.need.host == state.host > state.loading


# SD3-medium and SD3.5-large with a ControlNet of 12 blocks at 1024 px, as lean as can be.
@pytest.mark.slow
@pytest.mark.parametrize(("base", "most"), [("sd3-medium", 4.5e9), ("sd35-large", 10e9)])
def test_the_leanest_settings_fit_small_cards(base: str, most: float, tmp_path: Path) -> None:
    transformer = TRANSFORMERS[base]
    for name, found in (("transformer", transformer), ("vae", VAE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(found))
    preset: dict[str, Any] = read_section(Path("configs/cards/6gb.toml"), "train", TrainConfig)
    settings = preset | {"offload_base": transformer["num_layers"], "offload_activations": True}
    leanest = TrainConfig(
        pretrained_model_name_or_path=str(tmp_path),
        cache=(),
        estimate=True,
        resolution=1024,
        **settings | {"train_batch_size": 1},
    )
    assert estimate.need(leanest, None).free < most


@pytest.mark.slow
def test_what_is_advised_saves_as_much(config: TrainConfig) -> None:
    sizes = find_sizes(config)
    estimated = simulate(config, sizes)
    now = estimated.peak
    found = dict(remedies(config, sizes, estimated))
    levels = ["controlnet", "selective", "full"]
    saved = [found[f"--checkpointing {level}"] for level in levels]
    assert saved == sorted(saved)
    for level, less in zip(levels, saved, strict=True):
        assert now - simulate(replace(config, checkpointing=level), sizes).peak == less
    assert "--train-batch-size 1 --gradient-accumulation-steps 2" in found
    assert list(found.values()) == sorted(found.values(), reverse=True)
    # What is on already is not advised, nor what would not go with it.
    checkpointed = replace(config, checkpointing="full")
    on = dict(remedies(checkpointed, sizes, simulate(checkpointed, sizes)))
    assert not any("checkpointing" in flags for flags in on)


def test_only_what_training_would_accept_is_advised(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names(config: TrainConfig) -> set[str]:
        changes = estimate._possible_changes(config, 6)
        return {name for change in changes for name in change}

    offloads = {"offload_base", "offload_optimizer", "offload_activations"}
    assert offloads | {"optimizer", "fused_backward_pass"} <= names(config)
    assert "offload_base" not in names(replace(config, offload_base=6))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert offloads <= names(config)
    assert not {"bf16_weights", "fused_backward_pass"} & names(config)
    for strategy in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{strategy}", "true")
            assert not (offloads | {"optimizer"}) & names(config)
            levels = [one.get("checkpointing") for one in estimate._possible_changes(config, 6)]
            assert ("selective" in levels) is (strategy == "FSDP")
            assert {"controlnet", "full"} <= set(levels)


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_out_of_memory_says_what_would_help(
    config: TrainConfig, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore")

    monkeypatch.setattr(loop, "batch_losses", full)
    outcome = command("train", *flags(config))
    assert outcome.exit_code == 2
    assert (
        "Error: out of memory: CUDA out of memory. Tried to allocate 20.00 MiB." in outcome.output
    )
    assert re.search(r"^ +-0\.\d\d  --checkpointing full$", outcome.output, re.MULTILINE)


def test_pinned_memory_that_is_full_is_told_from_the_devices(
    config: TrainConfig, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(loop, "batch_losses", full)
    monkeypatch.setattr("train.run._memory_report", lambda _: [])  # shown by the test above
    outcome = command("train", *flags(config))
    assert outcome.exit_code == 2
    assert "out of memory: CUDA error: out of memory (perhaps host memory" in outcome.output
