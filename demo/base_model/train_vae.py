"""Training the miniature's VAE on circles and outlines; resumes from its last saved state.

Axes: B pictures, 3 colours, H x W pixels, C latent channels, h x w latent grid.
"""

import copy
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from demo.base_model.shapes import BASE_PX, PALETTE, paint_discs, paint_outlines
from demo.base_model.training_state import load_state, save_state, states_of, update_average
from demo.base_model.vae import build_vae, freeze_constant_channels

NUM_STEPS = 3000
BATCH = 16
OUTLINES_PER_BATCH = 6
NAMED_COLORS = 0.7  # share of batches in named colours; the others have any colours
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
        state_path: file of the state; training continues from it.
        masks: of discs, [N, H, W], 0 to 255.
        outlines: of the same circles, [N, H, W], 0 to 255.
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
    parts = {"vae": vae, "average": average, "optimizer": optimizer}
    start = load_state(state_path, parts, device).get("step", 0)
    for step in tqdm(range(start, NUM_STEPS), desc="VAE", initial=start, total=NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        pictures = draw_batch(masks, outlines, generator).to(device)
        optimizer.zero_grad(set_to_none=True)
        vae_loss(vae, pictures, torch.Generator().manual_seed(step)).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        update_average(average, vae, step, EMA_DECAY)
        if (step + 1) % SAVE_EVERY == 0:
            save_state(state_path, states_of(parts) | {"step": step + 1})
    return average.eval()


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return the squared error of pictures [B, 3, H, W] through the VAE, and a penalty on latents.

    Args:
        vae: the network.
        pictures: in -1 to 1.
        generator: of the posterior's noise, on the CPU.
    """
    latent: Tensor = vae.encode(pictures).latent_dist.mean
    noise = torch.randn(latent.shape, generator=generator).to(latent.device)
    decoded: Tensor = vae.decode(latent + LATENT_NOISE * noise).sample
    error = (decoded - pictures).square().mean()
    return error + LATENT_PENALTY * latent.square().mean()


def learning_rate(step: int) -> float:
    """Return the learning rate of a step: a short warmup, then a cosine down to 2 %."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 + 0.5 * math.cos(math.pi * step / NUM_STEPS)
    return LEARNING_RATE * warmup * (0.02 + 0.98 * cosine)


def draw_batch(masks: Tensor, outlines: Tensor, generator: torch.Generator) -> Tensor:
    """Return random crops of outlines and of discs in random colours, [B, 3, H, W].

    Args:
        masks: of discs, [N, H, W], 0 to 255.
        outlines: of the same circles, [N, H, W], 0 to 255.
        generator: of circles, colours and crop.
    """
    chosen = torch.randint(len(masks), (BATCH,), generator=generator)
    if torch.rand((), generator=generator) < NAMED_COLORS:
        colors = PALETTE[torch.randint(len(PALETTE), (BATCH, 2), generator=generator)]
    else:
        colors = 2 * torch.rand(BATCH, 2, 3, generator=generator) - 1
    lines, discs = chosen.split([OUTLINES_PER_BATCH, BATCH - OUTLINES_PER_BATCH])
    pictures = torch.cat(
        [paint_outlines(outlines[lines]), paint_discs(masks[discs], colors[OUTLINES_PER_BATCH:])]
    )
    top, left = (
        8 * int(torch.randint((BASE_PX - CROP_PX) // 8 + 1, (), generator=generator))
        for _ in range(2)
    )
    return pictures[:, :, top : top + CROP_PX, left : left + CROP_PX].contiguous()
