"""Blocks of the frozen base that come to the device ahead of their use."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigError
from sd3.quantized import quantize
from tests.train.memory.late_copies import make_copies_late
from train.assembly import assemble
from train.config import TrainConfig
from train.memory import streamed_base
from train.memory.estimate import find_sizes
from train.memory.simulation import simulate
from train.memory.streamed_base import StreamedBlocks, place_bytes, streamed_numbers, tensors_of

CPU = torch.device("cpu")
WIDTH = 8


class Network(nn.Module):
    """Frozen blocks in a row, each followed by a residual, as in SD3 with a ControlNet."""

    def __init__(self, kind: str | None, *, checkpointing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointing = checkpointing
        self.transformer_blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
            for _ in range(6)
        )
        self.requires_grad_(False)
        if kind is not None:
            quantize(self, kind)
            self.to(CPU)

    def forward(self, hidden: Tensor, residuals: Tensor) -> Tensor:
        for block, residual in zip(self.transformer_blocks, residuals, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False) + residual
            else:
                hidden = block(hidden) + residual
        return hidden


def passes(network: Network) -> list[Tensor]:
    """Return outputs and gradients of two steps, with two passes for validation between them."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        residuals = torch.randn(6, 3, WIDTH, requires_grad=True)
        outputs = network(torch.randn(3, WIDTH), residuals)
        outputs.square().sum().backward()
        assert residuals.grad is not None
        found += [outputs.detach(), residuals.grad]
        with torch.no_grad():
            found += [network(torch.randn(3, WIDTH), residuals) for _ in range(2)]
    return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind", [None, "int8", "fp8", pytest.param("nf4", marks=pytest.mark.extras)]
)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_streamed_blocks_compute_the_same_bits(
    count: int,
    kind: str | None,
    checkpointing: bool,
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = passes(Network(kind, checkpointing=checkpointing))
    if late:
        make_copies_late(monkeypatch, streamed_base)
    network = Network(kind, checkpointing=checkpointing)
    StreamedBlocks(network, count, CPU)
    found = passes(network)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_each_block_is_asked_for_while_the_one_before_it_computes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    network = Network(None, checkpointing=True)
    streamed = StreamedBlocks(network, 6, CPU)
    copies = {id(pairs): index for index, pairs in enumerate(streamed._copies)}
    monkeypatch.setattr(
        streamed._stream, "copy", lambda pairs: events.append(f"copy {copies[id(pairs)]}")
    )
    for number, block in enumerate(network.transformer_blocks):
        block[1].register_forward_hook(lambda *_, number=number: events.append(f"use {number}"))
    residuals = torch.randn(6, 3, WIDTH, requires_grad=True)
    outputs = network(torch.randn(3, WIDTH), residuals)
    # Two places: the next one comes into that of the one before.
    assert events.index("copy 1") < events.index("use 0")
    for number in range(1, 5):
        assert events.index(f"use {number - 1}") < events.index(f"copy {number + 1}")
        assert events.index(f"copy {number + 1}") < events.index(f"use {number}")
    events.clear()
    outputs.sum().backward()
    # The last two are still there; the first has no backward pass, but the next step needs it.
    assert [event for event in events if event.startswith("copy")] == [
        f"copy {number}" for number in (3, 2, 1, 0)
    ]
    for number in range(4, 1, -1):
        assert events.index(f"use {number + 1}") < events.index(f"copy {number - 1}")
        assert events.index(f"copy {number - 1}") < events.index(f"use {number}")


def test_blocks_are_spread_evenly_and_no_more_than_there_are() -> None:
    assert streamed_numbers(24, 12) == list(range(1, 24, 2))
    assert streamed_numbers(24, 24) == list(range(24))
    assert streamed_numbers(6, 1) == [3]
    assert streamed_numbers(24, 38) == list(range(24))  # as many as there are


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "int8", pytest.param("nf4", marks=pytest.mark.extras)])
def test_an_estimate_knows_what_stays_on_the_device(kind: Any, config: TrainConfig) -> None:
    config = replace(config, offload_base=4, quantize_base=kind)
    network = assemble(config).transformer
    storages = [tensor.untyped_storage() for tensor in tensors_of(network)]
    on_device = sum({one.data_ptr(): one.nbytes() for one in storages}.values())
    sizes = find_sizes(config)
    estimate = simulate(config, sizes)
    assert estimate.step["frozen base"] == pytest.approx(on_device, rel=0.001)
    whole = simulate(replace(config, offload_base=0), sizes).step["frozen base"]
    place = max(place_bytes(tensors_of(block)) for block in network.transformer_blocks)
    assert estimate.step["frozen base"] == whole - estimate.host + 2 * place


def test_compiled_blocks_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"--offload-base 2: .*leave out --compile or"):
        replace(config, offload_base=2, compile=True)
