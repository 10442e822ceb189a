"""The VAE in little memory."""

from typing import Any

# Side of a tile in pixels. The VAE's own is the size of its training, 1024 px for SD3's: so large
# that a picture of 1024 px would be one tile.
TILE_PX = 512


def save_memory(vae: Any, *, tiling: bool) -> None:
    """Let a VAE take one picture of a batch at a time; with `tiling`, one tile of it.

    Pictures are the same, one at a time; tiles leave faint seams.
    """
    vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_sample_min_size = min(TILE_PX, vae.tile_sample_min_size)
        vae.tile_latent_min_size = vae.tile_sample_min_size // factor
