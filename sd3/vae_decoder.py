"""The VAE's decoder, for the moment when somebody wants to see latents.

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
    """Decode raw latents with a base model's VAE, in float32; it is gone on return.

    Args:
        base: model folder with a VAE.
        variant: variant of its weight files.
        latents: [B, C, h, w] each, scale and shift not applied.
        device: where to decode.

    Returns:
        Pixels [B, H, W, 3], near -1 to 1, one array a batch.
    """
    # Imported here so that training without validation never sees a VAE.
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
    found = []
    for batch in latents:
        raw = batch.to(device, torch.float32)
        # One at a time: the decoder's activations are what fills a small card.
        pixels = [vae.decode(one, return_dict=False)[0] for one in raw.unsqueeze(1)]
        found.append(torch.cat(pixels).permute(0, 2, 3, 1).cpu().numpy())
    del vae
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def to_bytes(pixels: NDArray[np.float32], pixel_range: str = "-1_1") -> NDArray[np.uint8]:
    """Return pixels as 0 to 255.

    Args:
        pixels: of any shape.
        pixel_range: `-1_1`, or `0_1` for conditioning images that were encoded so.
    """
    unit = pixels / 2 + 0.5 if pixel_range == "-1_1" else pixels
    found: NDArray[np.uint8] = (unit.clip(0, 1) * 255).round().astype(np.uint8)
    return found
