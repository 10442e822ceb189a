"""Caches made in little memory, byte for byte those made without."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import T5EncoderModel

from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.format import manifest


def same_cache(one: Path, other: Path) -> None:
    """Check that two caches have the same records, checksums and fingerprints."""
    for ending in ("tar", "json"):
        names = sorted(path.relative_to(other) for path in other.glob(f"*/**/*.{ending}"))
        assert len(names) > 4
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for (_, found), (_, expected) in zip(
        manifest.load(one).products(), manifest.load(other).products(), strict=True
    ):
        assert found == expected


def test_t5_in_groups_gives_the_cache_of_whole_encoders(
    cache: Path, fresh: PrecomputeConfig
) -> None:
    precompute(replace(fresh, offload="groups"))
    same_cache(fresh.cache, cache)


@pytest.mark.slow
def test_batches_that_step_back_give_the_cache_of_small_ones(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(
        fresh, cache=fresh.cache.with_name("small"), text_batch_size=1, vae_batch_size=1
    )
    precompute(small)
    capsys.readouterr()
    for model, name in ((T5EncoderModel, "forward"), (AutoencoderKL, "encode")):
        original = getattr(model, name)

        def full(self: Any, batch: Any, *, original: Any = original, **named: Any) -> Any:
            if len(batch) > 1:
                raise torch.OutOfMemoryError("full")
            return original(self, batch, **named)

        monkeypatch.setattr(model, name, full)
    precompute(replace(fresh, text_batch_size="auto", vae_batch_size="auto"))
    same_cache(fresh.cache, small.cache)
    said = capsys.readouterr().out
    assert "memory ran out at 32 prompts a batch; 1 were encoded at once" in said
    assert "memory ran out at 8 images a batch; 1 were encoded at once" in said
