"""Decoding latents with the VAE.

Axes: B pictures, C latent channels, h x w latent grid, H x W pixels.
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd3.pretrained import component_variant


@torch.no_grad()
def decode(
    base: Path, variant: str | None, latents: Sequence[Tensor], device: torch.device
) -> list[NDArray[np.float32]]:
    """Decode raw latents with a base model's VAE, in float32; free the VAE afterwards.

    Args:
        base: model folder with a VAE.
        variant: of its weight files; None for the plain ones.
        latents: batches [B, C, h, w], scale and shift not applied.
        device: to decode on.

    Returns:
        For each batch, pixels [B, H, W, 3], about -1 to 1.
    """
    # Imported here so that training without validation loads no VAE class.
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(
        base,
        subfolder="vae",
        variant=component_variant(base / "vae", variant),
        dtype=torch.float32,
        use_safetensors=True,
    )
    vae.encoder = None
    vae.to(device).eval()
    pixels = []
    for batch in latents:
        raw = batch.to(device, torch.float32)
        # One latent at a time: the decoder's activations fill a small card.
        decoded = [vae.decode(latent, return_dict=False)[0] for latent in raw.unsqueeze(1)]
        pixels.append(torch.cat(decoded).permute(0, 2, 3, 1).cpu().numpy())
    del vae
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return pixels


def to_bytes(pixels: NDArray[np.float32], pixel_range: str = "-1_1") -> NDArray[np.uint8]:
    """Return pixels as integers 0 to 255.

    Args:
        pixels: of any shape.
        pixel_range: of `pixels`: `-1_1`, or `0_1` for conditioning images encoded in that range. In
            `stability_canny` the VAE cannot give back what it got; it is shown as `-1_1`.
    """
    unit = pixels if pixel_range == "0_1" else pixels / 2 + 0.5
    rounded: NDArray[np.uint8] = (unit.clip(0, 1) * 255).round().astype(np.uint8)
    return rounded
