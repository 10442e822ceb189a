"""The VAE's encoder.

Axes: B images, 3 colours, H x W pixels, C latent channels, h x w latent grid (H / 8, W / 8).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import RunError
from common.memory.exhausted import device_remedies, full_memory_line, is_out_of_memory
from precompute.encoding.batch_size import BatchSize, in_parts
from precompute.fingerprints.encoder_spec import LatentSettings
from sd3.inpainting import kept_cells
from sd3.pixels import to_pixels
from sd3.pretrained import component_variant


class VaeEncoder:
    """The VAE's encoder.

    Args:
        vae: on the device; its decoder is dropped.
        settings: number formats, and whether to keep the posterior's standard deviation.
        device: where it computes.
    """

    def __init__(self, vae: Any, settings: LatentSettings, device: torch.device) -> None:
        self.dtype = getattr(torch, settings.compute_dtype)
        self.cache_dtype = getattr(torch, settings.cache_dtype)
        self.posterior = settings.posterior
        self.device = device
        self.settings = settings
        vae.decoder = None
        if settings.tiled:
            vae.enable_tiling()
        # The layout that tensor cores take. Elsewhere the plain one: it decides how CPUs round, and
        # so the bytes of caches.
        self.memory_format = torch.contiguous_format
        if device.type == "cuda":
            self.memory_format = torch.channels_last
            vae.to(memory_format=self.memory_format)
        self.vae = vae.eval()

    @classmethod
    def load(
        cls, base: Path, settings: LatentSettings, device: torch.device, variant: str | None
    ) -> "VaeEncoder":
        """Return that of a base model.

        Args:
            base: model folder with a VAE.
            settings: number formats, and whether to keep the posterior's standard deviation.
            device: where it computes.
            variant: variant of the weight files.

        Raises:
            RunError: it does not fit the device's memory.
        """
        from diffusers import AutoencoderKL

        try:
            vae = AutoencoderKL.from_pretrained(
                base,
                subfolder="vae",
                variant=component_variant(base / "vae", variant),
                dtype=getattr(torch, settings.compute_dtype),
                use_safetensors=True,
                device_map={"": str(device)},  # load onto the device directly
            )
            return cls(vae, settings, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                full_memory_line("the VAE", error, _remedies(settings, device))
            ) from error

    @torch.no_grad()
    def encode(
        self, uint8: Tensor, pixel_range: str, name: str, size: BatchSize
    ) -> dict[str, Tensor]:
        """Return the latents of images as the VAE computes them: not shifted, not scaled.

        Args:
            uint8: [B, 3, H, W], 0 to 255; or [B, 4, H, W], images of `sd3.inpainting`.
            pixel_range: range of the pixels that the VAE is given; see `sd3.pixels`.
            name: of the tensor, `latent` or `conditioning_latent`.
            size: how many images are encoded at once.

        Returns:
            `<name>` [B, C, h, w], and `<name>_std` where the cache keeps it, in the cache's number
            format, on the device; for inpainting also `conditioning_mask`, [B, 1, h, w].
        """
        pictures, alpha = uint8[:, :3], uint8[:, 3:]

        def compute(part: Tensor) -> dict[str, Tensor]:
            pixels = to_pixels(part.to(self.device, non_blocking=True), pixel_range)
            pixels = pixels.to(self.dtype, memory_format=self.memory_format)
            posterior = self.vae.encode(pixels).latent_dist
            tensors = {name: posterior.mean}
            if self.posterior == "mean_std":
                tensors[f"{name}_std"] = posterior.std
            return tensors

        remedies = _remedies(self.settings, self.device)
        latents = in_parts(compute, [pictures], size, item="image", remedies=remedies)
        encoded = {
            key: tensor.to(self.cache_dtype, memory_format=torch.contiguous_format)
            for key, tensor in latents.items()
        }
        if not alpha.shape[1]:
            return encoded
        factor = alpha.shape[-1] // encoded[name].shape[-1]
        return encoded | {"conditioning_mask": kept_cells(uint8, factor).to(self.device)}


def _remedies(settings: LatentSettings, device: torch.device) -> list[str]:
    """Return what lessens the memory that the VAE takes, the best first."""
    remedies = ["--vae-dtype bfloat16"] if settings.compute_dtype == "float32" else []
    if not settings.tiled:
        remedies.append("a smaller --resolution")
    return [*remedies, *device_remedies(device)]
