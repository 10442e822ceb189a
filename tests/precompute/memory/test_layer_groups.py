"""T5 brought to the device layer by layer, with the CPU in the device's place."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

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


def note_visits(layers: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return where what comes and goes is noted, with -1 for what is no layer."""
    from diffusers.hooks.group_offloading import ModuleGroup

    visits: list[tuple[str, int]] = []
    for name in ("onload_", "offload_"):
        original = getattr(ModuleGroup, name)

        def noting(group: ModuleGroup, name: str = name, original: Any = original) -> None:
            if group.modules:
                first = group.modules[0]
                visits.append((name, layers.index(first) if first in layers else -1))
            original(group)

        monkeypatch.setattr(ModuleGroup, name, noting)
    return visits


def test_every_layer_visits_the_device_in_its_turn(
    base: Path, fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = TextEncoders.load(base, text_settings(fresh), CPU, None, in_groups=True)
    whole = TextEncoders.load(base, text_settings(fresh), CPU, None)
    layers = list(encoders.t5.encoder.block)
    visits = note_visits(layers, monkeypatch)
    tokens = whole.tokenize(["a circle", "", "two circles"])
    found = encoders.encode(tokens, BatchSize(2))
    # Three prompts in two parts.
    once = [(name, at) for at in range(len(layers)) for name in ("onload_", "offload_")]
    assert visits == 2 * once
    for name, tensor in whole.encode(tokens, BatchSize(2)).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("rest_stays", [True, False])
def test_nothing_stays_on_a_device_whose_memory_ran_out(
    rest_stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    t5 = small_t5()
    layer_groups.bring_in_groups(t5, CPU, rest_stays=rest_stays)
    visits = note_visits(list(t5.encoder.block), monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(t5.encoder.block[1].layer[1], "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        t5(torch.zeros(1, 2, dtype=torch.long))
    there = {at for name, at in visits if name == "onload_"}
    assert there == ({0, 1} if rest_stays else {-1, 0, 1})
    last = {at: name for name, at in visits}
    assert all(last[at] == "offload_" for at in there)


def test_what_is_no_layer_can_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda _: None)
    t5 = small_t5()
    layer_groups.bring_in_groups(t5, torch.device("meta"), rest_stays=True)
    assert {weight.device.type for weight in t5.encoder.block.parameters()} == {"cpu"}
    rest = (t5.encoder.embed_tokens, t5.encoder.final_layer_norm)
    assert {module.weight.device.type for module in rest} == {"meta"}


def small_t5() -> Any:
    """Return an encoder of three layers."""
    return T5EncoderModel(
        T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2)
    ).eval()
