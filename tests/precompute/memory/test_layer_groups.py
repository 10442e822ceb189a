"""T5 brought to the device layer by layer, with the CPU in the device's place."""

from pathlib import Path

import pytest
import torch

from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders
from precompute.fingerprints.encoder_spec import text_settings
from precompute.memory import layer_groups

CPU = torch.device("cpu")


def test_weights_share_pieces_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_groups, "PIECE_BYTES", 2048)
    assert layer_groups.share_out([]) == []
    # Each begins at a multiple of 256; the last piece is no larger than it must be.
    pieces = layer_groups.share_out([1000, 700, 512, 3000, 100])
    assert pieces == [(2048, [0, 1024]), (512, [0]), (4096, [0]), (256, [0])]
    # 3000 in their old place with 100 to 1000 of the others, beside all pieces until then.
    assert layer_groups.host_peak([3000, 100]) == 256 + 3000 + 4096
    assert layer_groups.host_peak([100, 700, 1000]) == 1800 + 2048


def test_pinned_weights_keep_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_groups, "PIECE_BYTES", 1024)
    empty = torch.empty
    made: list[int] = []

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(size)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(layer_groups.torch, "empty", pinned)
    numbers = [torch.arange(100.0).reshape(4, 25), torch.arange(9).half(), torch.arange(200.0)]
    weights = [torch.nn.Parameter(each.clone()) for each in numbers]
    layer_groups._pin(weights)
    assert made == [1024, 1024]
    for weight, expected in zip(weights, numbers, strict=True):
        assert weight.dtype == expected.dtype
        assert torch.equal(weight, expected)
    assert weights[0].untyped_storage().data_ptr() == weights[1].untyped_storage().data_ptr()


def test_every_layer_visits_the_device_in_its_turn(
    base: Path, fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = TextEncoders.load(base, text_settings(fresh), CPU, None, in_groups=True)
    whole = TextEncoders.load(base, text_settings(fresh), CPU, None)
    layers = list(encoders.t5.encoder.block)
    visits: list[tuple[str, int]] = []
    from diffusers.hooks.group_offloading import ModuleGroup

    for name in ("onload_", "offload_"):
        original = getattr(ModuleGroup, name)

        def noting(group: ModuleGroup, name: str = name, original: object = original) -> None:
            if group.modules[0] in layers:
                visits.append((name, layers.index(group.modules[0])))
            original(group)  # type: ignore[operator]

        monkeypatch.setattr(ModuleGroup, name, noting)
    tokens = whole.tokenize(["a circle", "", "two circles"])
    found = encoders.encode(tokens, BatchSize(2))
    # Three prompts in two parts.
    once = [(name, at) for at in range(len(layers)) for name in ("onload_", "offload_")]
    assert visits == 2 * once
    for name, tensor in whole.encode(tokens, BatchSize(2)).items():
        assert torch.equal(found[name], tensor)
