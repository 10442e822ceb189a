"""Training the miniature's VAE on circles and outlines; resumes from its last saved state.

Axes: B pictures, 3 colours, H x W pixels, C latent channels, h x w latent grid.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from demo.base_model.shapes import BASE_PX, PALETTE, paint_discs, paint_outlines
from demo.base_model.vae import build_vae, freeze_constant_channels

NUM_STEPS = 3000
BATCH = 16
OUTLINES_A_BATCH = 6
NAMED_COLORS = 0.7  # of the batches; the others have colours from all of the cube
CROP_PX = 64  # the network is convolutional: crops teach as much for a quarter of the work
LEARNING_RATE = 4e-4
WARMUP_STEPS = 50
LATENT_NOISE = math.exp(-6 / 2)  # of the posterior, whose log variance is fixed
LATENT_PENALTY = 1e-4
EMA_DECAY = 0.995
SAVE_EVERY = 100


def train_vae(
    state_path: Path, masks: Tensor, outlines: Tensor, device: torch.device, seed: int
) -> AutoencoderKL:
    """Return the trained VAE, its weights averaged over the last few hundred steps.

    Args:
        state_path: where the state is kept; training goes on from there.
        masks: of discs, [N, H, W], 0 to 255.
        outlines: of the same, [N, H, W], 0 to 255.
        device: where to train.
        seed: of the weights and the batches.
    """
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    freeze_constant_channels(vae)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0
    )
    start = 0
    if state_path.is_file():
        state = torch.load(state_path, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    for step in tqdm(range(start, NUM_STEPS), desc="VAE", initial=start, total=NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step)
        pictures = _batch(masks, outlines, torch.Generator().manual_seed(seed * 10**6 + step))
        pictures = pictures.to(device)
        latent = vae.encode(pictures).latent_dist.mean
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(step))
        decoded = vae.decode(latent + LATENT_NOISE * noise.to(device)).sample
        error = (decoded - pictures).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (error + LATENT_PENALTY * latent.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        update_average(average, vae, min(EMA_DECAY, (step + 1) / (step + 10)))
        if (step + 1) % SAVE_EVERY == 0:
            save_state(
                state_path,
                {
                    "vae": vae.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )
    return average.eval()


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move an average of a model's weights on by one step."""
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 1 - decay)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training state so that it is there whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _learning_rate(step: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)
    return LEARNING_RATE * warmup * (0.02 + 0.98 * cosine)


def _batch(masks: Tensor, outlines: Tensor, generator: torch.Generator) -> Tensor:
    """Return random crops of outlines and of discs in random colours, [B, 3, H, W]."""
    chosen = torch.randint(len(masks), (BATCH,), generator=generator)
    if torch.rand((), generator=generator) < NAMED_COLORS:
        colors = PALETTE[torch.randint(len(PALETTE), (BATCH, 2), generator=generator)]
    else:
        colors = 2 * torch.rand(BATCH, 2, 3, generator=generator) - 1
    lines, discs = chosen.split([OUTLINES_A_BATCH, BATCH - OUTLINES_A_BATCH])
    pictures = torch.cat(
        [paint_outlines(outlines[lines]), paint_discs(masks[discs], colors[OUTLINES_A_BATCH:])]
    )
    top, left = (
        8 * int(torch.randint((BASE_PX - CROP_PX) // 8 + 1, (), generator=generator))
        for _ in range(2)
    )
    return pictures[:, :, top : top + CROP_PX, left : left + CROP_PX].contiguous()
