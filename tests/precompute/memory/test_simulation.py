"""The peaks of stage 1 that a simulation finds, compared with what encoding takes."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bases import VAE
from benchmarks.random_weights import text_encoders
from common.memory.meter import Meter
from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.fingerprints.encoder_spec import latent_settings, text_settings
from precompute.memory.layer_groups import PIECE_BYTES
from precompute.memory.simulation import Sizes, image_peak, read_sizes, text_peaks

CPU = torch.device("cpu")
# Weights of SD3's encoders, as their model cards and papers count them.
CLIP_L, CLIP_G, T5_XXL = 123_650_304, 694_659_840, 4_762_310_656


@pytest.fixture(scope="module")
def sd3() -> Sizes:
    with FakeTensorMode():
        clip_l, clip_g, t5 = (model.config.to_dict() for _, model in text_encoders())
    return Sizes((clip_l, clip_g), t5, VAE)


@pytest.fixture
def large(fresh: PrecomputeConfig) -> PrecomputeConfig:
    """As it is run on a small card."""
    return replace(fresh, resolution=1024, max_sequence_length=77, text_dtype="float16")


@pytest.mark.slow
def test_sd3_in_groups_fits_6_gb(sd3: Sizes, large: PrecomputeConfig) -> None:
    text = text_peaks(sd3, text_settings(large), 128)["groups"]
    assert text.total < 6e9
    assert image_peak(sd3, latent_settings(large), 1).total < 6e9
    # A layer: four products of attention and two of the feed-forward in 16 bit, the third in 32.
    layer = 2 * (4 * 4096**2 + 2 * 4096 * 10240 + 2 * 4096) + 4 * 4096 * 10240
    bias = 2 * 32 * 64  # of the first layer alone
    resident = 2 * (CLIP_L + CLIP_G + 32128 * 4096 + 4096)
    ids = 2 * 8 * 77  # positions of both CLIPs
    assert text.weights == resident + 2 * layer + bias + ids
    # In pieces of 1 GiB: three of attention (32 products in each, the first shared with norms and
    # bias), four of 16 bit products of the feed-forward (12), four of 32 bit ones (6). The last
    # piece is there while what it takes is still in its old place.
    attention, half, full = 2 * 4096**2, 2 * 4096 * 10240, 4 * 4096 * 10240
    assert 32 * attention == PIECE_BYTES
    assert 12 * half < PIECE_BYTES < 13 * half
    assert 6 * full < PIECE_BYTES < 7 * full
    t5 = 2 * (32128 * 4096 + 4096)
    assert text.host == pytest.approx(11 * PIECE_BYTES + 6 * full + t5, rel=0.02)


@pytest.mark.slow
def test_sd3_in_one_takes_all_weights(sd3: Sizes, large: PrecomputeConfig) -> None:
    settings = text_settings(replace(large, text_dtype="bfloat16"))
    peak = text_peaks(sd3, settings, 1)["none"]
    assert peak.weights == 2 * (CLIP_L + CLIP_G + T5_XXL) + 2 * 8 * 77
    assert peak.host == 0


def measured(weights: Iterable[Tensor], encode: Callable[[], object]) -> dict[str, int]:
    """Return the most bytes that encoding twice takes, by real tensors."""
    with Meter() as meter:
        for weight in weights:
            meter.count(weight, "weights")
        meter.reset_peak()
        first = encode()
        again = encode()
        del first, again
    return meter.peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peaks_are_as_counted(base: Path, fresh: PrecomputeConfig, dtype: Any) -> None:
    config = replace(fresh, text_dtype=dtype, vae_dtype=dtype)
    sizes = read_sizes(base)
    of_text, of_latents = text_settings(config), latent_settings(config)
    encoders = TextEncoders.load(base, of_text, CPU, None)
    tokens = encoders.tokenize(["a circle"] * 3)
    weights = [
        weight
        for model in (*encoders.clips, encoders.t5)
        for weight in (*model.parameters(), *model.buffers())
    ]
    found = measured(weights, lambda: encoders.encode(tokens, BatchSize(3)))
    peak = text_peaks(sizes, of_text, 3)["none"]
    assert peak.weights == found["weights"]
    assert peak.activations == pytest.approx(found["activations"], rel=0.03)
    vae = VaeEncoder.load(base, of_latents, CPU, None)
    pixels = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    found = measured(
        vae.vae.parameters(), lambda: vae.encode(pixels, "-1_1", "latent", BatchSize(2))
    )
    peak = image_peak(sizes, of_latents, 2)
    assert peak.weights == found["weights"]
    assert peak.activations == pytest.approx(found["activations"], rel=0.03)
