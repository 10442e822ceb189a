"""T5 brought to the device layer by layer, with the CPU in the device's place."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders
from precompute.fingerprints.encoder_spec import text_settings
from precompute.run import precompute

CPU = torch.device("cpu")


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


def test_every_record_is_byte_for_byte_that_of_whole_encoders(
    cache: Path, fresh: PrecomputeConfig
) -> None:
    precompute(replace(fresh, offload="groups"))
    tars = sorted(path.relative_to(cache) for path in cache.rglob("*.tar"))
    assert len(tars) > 4
    for tar in tars:
        assert (fresh.cache / tar).read_bytes() == (cache / tar).read_bytes(), tar
