"""The first batch of a pass is encoded twice and compared before anything is written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from common.errors import RunError
from precompute.config import PrecomputeConfig
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.run import precompute

Change = Callable[[Tensor], Tensor]


def rounded(latents: Tensor) -> Tensor:
    return latents.half().to(latents.dtype)


def without_the_last(latents: Tensor) -> Tensor:
    return torch.cat([latents[:-1], torch.zeros_like(latents[-1:])])


def not_a_number(latents: Tensor) -> Tensor:
    return latents.where(latents != latents.max(), torch.nan)


def change_the_second(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """Have the VAE's second batch come out otherwise; it is the first one, encoded again."""
    original, count = VaeEncoder.encode, [0]

    def encode(self: VaeEncoder, *inputs: object) -> dict[str, Tensor]:
        count[0] += 1
        tensors = original(self, *inputs)  # type: ignore[arg-type]
        if count[0] != 2:
            return tensors
        return {name: change(tensor) for name, tensor in tensors.items()}

    monkeypatch.setattr(VaeEncoder, "encode", encode)


@pytest.mark.parametrize("change", [without_the_last, not_a_number])
def test_a_batch_that_comes_out_otherwise_ends_the_run(
    change: Change, fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_the_second(monkeypatch, change)
    with pytest.raises(RunError, match=r"latents, the first batch: latent .* an item differs by"):
        precompute(fresh)
    assert list((fresh.cache / "text").glob("*.tar"))
    assert not (fresh.cache / "latents").exists()


def test_another_rounding_is_let_pass(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_the_second(monkeypatch, rounded)
    precompute(fresh)
    assert (fresh.cache / "manifest.json").is_file()
