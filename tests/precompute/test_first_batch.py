"""The first batch of a pass is encoded twice and compared before anything is written."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import RunError
from precompute.config import PrecomputeConfig
from precompute.encoding import encoder_clock
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.text_pass import encode_text
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.planning.prepare import prepare
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


def test_the_second_encoding_is_not_timed(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[bool] = []

    class Clock(EncoderClock):
        measuring = False

        @contextlib.contextmanager
        def measure(self, num_items: int) -> Iterator[None]:
            self.measuring = True
            with super().measure(num_items):
                yield
            self.measuring = False

    context = prepare(fresh)
    clock, original = Clock(context.device), TextEncoders.encode

    def encode(self: TextEncoders, *inputs: Any) -> dict[str, Tensor]:
        timed.append(clock.measuring)
        return original(self, *inputs)

    monkeypatch.setattr(TextEncoders, "encode", encode)
    encode_text(context, lambda: None, clock)
    # 11 prompts in six shards of two, then the two validation prompts one by one.
    assert timed == [True, False, *[True] * 5, False, False]


def test_what_is_left_out_counts_neither_as_encoding_nor_as_time_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(encoder_clock.time, "perf_counter", lambda: now)
    clock = EncoderClock(torch.device("cpu"))
    with clock.measure(1):
        now += 1
    with clock.left_out():
        now += 5
    now += 2
    with clock.measure(1):
        now += 3
    assert clock.seconds == 1 + 3
    assert now - clock.began == 1 + 2 + 3
