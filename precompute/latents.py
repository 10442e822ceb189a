"""The latent pass: images and conditioning images through the VAE, once.

Axes: B images, 3 colours, H x W pixels, C latent channels, h x w latent grid (H / 8, W / 8).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from precompute.fingerprint import hash_component
from precompute.images import to_pixels
from shards.errors import ConfigError
from shards.manifest import LatentSpec
from shards.pretrained import component_variant, read_config


@dataclass(frozen=True)
class LatentSettings:
    """What determines the latent of an image, besides the weights."""

    resolution_px: int
    posterior: str
    compute_dtype: str
    cache_dtype: str
    background: str


def latent_spec(base: Path, settings: LatentSettings, pixel_range: str) -> LatentSpec:
    """Return the shape and scaling of the latents, from the VAE's configuration.

    Raises:
        ConfigError: the configuration is not that of an SD3 VAE.
    """
    config = read_config(base, "vae")
    try:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return LatentSpec(
            latent_channels=int(config["latent_channels"]),
            vae_scale_factor=factor,
            scaling_factor=float(config["scaling_factor"]),
            shift_factor=float(config["shift_factor"]),
            posterior=settings.posterior,
            pixel_range=pixel_range,
            dtype=settings.cache_dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'vae' / 'config.json'}: not the VAE of an SD3 model ({error!r}); its "
            "configuration must have latent_channels, scaling_factor and shift_factor."
        ) from error


def latent_identity(base: Path, variant: str | None, settings: LatentSettings) -> dict[str, Any]:
    """Return everything that the bytes of a latent record depend on, but for the image."""
    return {
        "vae": hash_component(base / "vae", variant),
        "resolution_px": settings.resolution_px,
        "geometry": "upright; resize shorter side, bilinear; centre crop",
        "background": ImageColor.getrgb(settings.background),
        "posterior": settings.posterior,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
    }


class LatentEncoder:
    """The VAE's encoder on a device.

    Args:
        base: model folder with a VAE.
        settings: number formats and what to keep of the posterior.
        device: where it runs.
        variant: variant of the weight files.
    """

    def __init__(
        self, base: Path, settings: LatentSettings, device: torch.device, variant: str | None
    ) -> None:
        from diffusers import AutoencoderKL

        self.dtype = getattr(torch, settings.compute_dtype)
        self.cache_dtype = getattr(torch, settings.cache_dtype)
        self.posterior = settings.posterior
        self.device = device
        vae = AutoencoderKL.from_pretrained(
            base,
            subfolder="vae",
            variant=component_variant(base / "vae", variant),
            dtype=self.dtype,
            use_safetensors=True,
        )
        vae.decoder = None
        self.vae = vae.to(device).eval()

    @torch.no_grad()
    def encode(self, uint8: Tensor, pixel_range: str, name: str) -> dict[str, Tensor]:
        """Return the latents of images, raw as the VAE gives them: not shifted, not scaled.

        Args:
            uint8: [B, 3, H, W], 0 to 255.
            pixel_range: see `precompute.images.to_pixels`.
            name: of the tensor, `latent` or `conditioning_latent`.

        Returns:
            `<name>` [B, C, h, w], and `<name>_std` where the cache keeps it; on the CPU, in the
            cache's number format.
        """
        pixels = to_pixels(uint8.to(self.device), pixel_range).to(self.dtype)
        posterior = self.vae.encode(pixels).latent_dist
        tensors = {name: posterior.mean}
        if self.posterior == "mean_std":
            tensors[f"{name}_std"] = posterior.std
        return {key: tensor.to("cpu", self.cache_dtype) for key, tensor in tensors.items()}


def finite(tensors: dict[str, Tensor]) -> bool:
    """Tell whether all numbers of a record are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
