"""How good a miniature base is, measured on circles and colours that it was not trained on.

Axes: B pictures, 3 colours, H x W pixels, C latent channels, h x w latent grid.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from demo.base_model.pipeline import CLIP_TOKENS
from demo.base_model.shapes import (
    HELD_OUT_PAIRS,
    NAMES,
    PALETTE,
    caption,
    paint_discs,
    paint_outlines,
)
from demo.colors import COLORS
from infer.scoring.discs import background_color, color_difference, find_disc, find_patch
from train.objective import scaled

NUM_PROMPTS = 200
# A little guidance makes the shapes rounder; SD3's 7 saturates the colours.
GUIDANCE_SCALE = 2.0
NUM_INFERENCE_STEPS = 28
BATCH = 20
VAE_BATCH = 8


@dataclass(frozen=True)
class PromptQuality:
    """Figures of pictures drawn by prompt alone.

    Attributes:
        num_pictures: drawn.
        num_patches: of them, those where something stands out from the background.
        num_discs: of those, the ones where it is round.
        patch_color_error: CIEDE2000 difference of what stands out from the disc's colour, median.
        background_color_error: CIEDE2000 difference of the background from its colour, median.
    """

    num_pictures: int
    num_patches: int
    num_discs: int
    patch_color_error: float
    background_color_error: float


@dataclass(frozen=True)
class Quality:
    """Figures of a base on held-out circles and pairs of colours.

    Attributes:
        disc_psnr_db: of the VAE on filled discs.
        outline_psnr_db: of the VAE on conditioning images.
        latent_mean: of the discs' scaled latents.
        latent_std: standard deviation of the discs' scaled latents.
        by_prompt: of pictures drawn by prompt alone.
    """

    disc_psnr_db: float
    outline_psnr_db: float
    latent_mean: float
    latent_std: float
    by_prompt: PromptQuality


def measure_base(
    pipeline: StableDiffusion3Pipeline, masks: Tensor, outlines: Tensor, seed: int
) -> Quality:
    """Measure a base, in float32.

    Args:
        pipeline: on its device.
        masks: of discs that it has not seen, [N, H, W], 0 to 255.
        outlines: of the same circles, [N, H, W], 0 to 255.
        seed: of pairs of colours and noise.
    """
    vae = pipeline.vae
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(HELD_OUT_PAIRS), (len(masks),), generator=generator)
    discs = paint_discs(masks, PALETTE[HELD_OUT_PAIRS[chosen]]).to(vae.device)
    latents = scaled(encode_images(vae, discs), vae.config.scaling_factor, vae.config.shift_factor)
    return Quality(
        disc_psnr_db=measure_psnr(vae, discs),
        outline_psnr_db=measure_psnr(vae, paint_outlines(outlines).to(vae.device)),
        latent_mean=latents.mean().item(),
        latent_std=latents.std().item(),
        by_prompt=measure_by_prompt(pipeline, generator),
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return latents [B, C, h, w], not scaled, of pictures [B, 3, H, W] in -1 to 1."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(VAE_BATCH)])


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Return the PSNR in dB of pictures [B, 3, H, W] in -1 to 1 after a pass through the VAE."""
    latents = encode_images(vae, pictures)
    decoded = torch.cat([vae.decode(part).sample for part in latents.split(VAE_BATCH)])
    error = decoded.clamp(-1, 1) - pictures
    return float(10 * torch.log10(4 / error.square().mean()))


def measure_by_prompt(
    pipeline: StableDiffusion3Pipeline, generator: torch.Generator
) -> PromptQuality:
    """Draw pictures by prompt alone, and measure their colours and shapes."""
    num_discs = 0
    patch_errors, background_errors = [], []
    for pair, pixels in draw_by_prompt(pipeline, generator):
        color, background = (COLORS[NAMES[index]] for index in pair)
        background_errors.append(color_difference(background_color(pixels), background))
        if (patch := find_patch(pixels)) is not None:
            patch_errors.append(color_difference(patch.color, color))
        num_discs += find_disc(pixels) is not None
    return PromptQuality(
        num_pictures=len(background_errors),
        num_patches=len(patch_errors),
        num_discs=num_discs,
        patch_color_error=float(np.median(patch_errors)) if patch_errors else float("nan"),
        background_color_error=float(np.median(background_errors)),
    )


def draw_by_prompt(
    pipeline: StableDiffusion3Pipeline, generator: torch.Generator
) -> list[tuple[list[int], NDArray[np.uint8]]]:
    """Return pairs of colours, by index, and the pictures [H, W, 3] drawn from their captions."""
    chosen = torch.randint(len(HELD_OUT_PAIRS), (NUM_PROMPTS,), generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for pairs in tqdm(HELD_OUT_PAIRS[chosen].split(BATCH), desc="colours", disable=None):
        pictures = pipeline(
            [caption(pair) for pair in pairs],
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            max_sequence_length=CLIP_TOKENS,
            generator=generator,
        ).images
        drawn += [
            (pair, np.asarray(picture))
            for pair, picture in zip(pairs.tolist(), pictures, strict=True)
        ]
    return drawn
