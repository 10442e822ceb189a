"""How good a miniature base is, measured on what it was not trained on.

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


@dataclass(frozen=True)
class Quality:
    """Figures of a base on held-out circles and pairs of colours.

    Attributes:
        disc_psnr_db: of the VAE on filled discs.
        outline_psnr_db: of the VAE on conditioning images.
        latent_mean: of the discs' scaled latents.
        latent_std: of the same.
        num_prompts: pictures drawn by prompt alone.
        patches: in how many of them something stood out from the background.
        discs: in how many that was round.
        patch_color_error: CIEDE2000 of what stood out and the disc's colour, median.
        background_color_error: the same of the background.
    """

    disc_psnr_db: float
    outline_psnr_db: float
    latent_mean: float
    latent_std: float
    num_prompts: int
    patches: int
    discs: int
    patch_color_error: float
    background_color_error: float


def measure_base(
    pipeline: StableDiffusion3Pipeline, masks: Tensor, outlines: Tensor, seed: int
) -> Quality:
    """Measure a base, in float32.

    Args:
        pipeline: on its device.
        masks: of discs that it has not seen, [N, H, W], 0 to 255.
        outlines: of the same, [N, H, W], 0 to 255.
        seed: of pairs of colours and noise.
    """
    device = pipeline.vae.device
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(HELD_OUT_PAIRS), (len(masks),), generator=generator)
    discs = paint_discs(masks, PALETTE[HELD_OUT_PAIRS[chosen]]).to(device)
    lines = paint_outlines(outlines).to(device)
    latents = scaled(
        encode_images(pipeline.vae, discs),
        pipeline.vae.config.scaling_factor,
        pipeline.vae.config.shift_factor,
    )
    drawn = draw_by_prompt(pipeline, generator)
    wanted = [[COLORS[NAMES[index]] for index in pair] for pair, _ in drawn]
    patches = [find_patch(pixels) for _, pixels in drawn]
    patch_errors = [
        color_difference(patch.color, colors[0])
        for patch, colors in zip(patches, wanted, strict=True)
        if patch is not None
    ]
    background_errors = [
        color_difference(background_color(pixels), colors[1])
        for (_, pixels), colors in zip(drawn, wanted, strict=True)
    ]
    return Quality(
        disc_psnr_db=measure_psnr(pipeline.vae, discs),
        outline_psnr_db=measure_psnr(pipeline.vae, lines),
        latent_mean=latents.mean().item(),
        latent_std=latents.std().item(),
        num_prompts=len(drawn),
        patches=len(patch_errors),
        discs=sum(find_disc(pixels) is not None for _, pixels in drawn),
        patch_color_error=float(np.median(patch_errors)) if patch_errors else float("nan"),
        background_color_error=float(np.median(background_errors)),
    )


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return raw latents [B, C, h, w] of pictures [B, 3, H, W]."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(8)])


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Return the PSNR in dB of pictures [B, 3, H, W] that went through the VAE."""
    decoded = torch.cat([vae.decode(part).sample for part in encode_images(vae, pictures).split(8)])
    error = decoded.clamp(-1, 1) - pictures
    return float(10 * torch.log10(4 / error.square().mean()))


def draw_by_prompt(
    pipeline: StableDiffusion3Pipeline, generator: torch.Generator
) -> list[tuple[list[int], NDArray[np.uint8]]]:
    """Return pairs of colours, by index, and the pictures [H, W, 3] that their captions give."""
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
