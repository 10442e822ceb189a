"""Sampling from cached embeddings, with the same result as the stock pipeline.

Axes: B pictures, N = 2 B with guidance and else B, C latent channels, h x w latent grid,
H x W pixels, T tokens, W embedding width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sd3.prompt_embeds import record_embeds
from shards.reading.cache import Cache
from train.loss import Objective, control_of, run_networks


@dataclass(frozen=True)
class Pair:
    """A validation pair, as cached.

    Attributes:
        prompt: its text.
        conditioning_image: [3, H, W], 0 to 255; for inpainting black in the part to be drawn.
        conditioning_latent: as the VAE gives it, [C, h, w].
        conditioning_mask: for inpainting, [1, h, w]; None otherwise.
        embeds: CLIP and T5 embeddings of the prompt, [T, W].
        pooled: pooled embedding of the prompt, [W].
    """

    prompt: str
    conditioning_image: Tensor
    conditioning_latent: Tensor
    conditioning_mask: Tensor | None
    embeds: Tensor
    pooled: Tensor


def read_pairs(cache: Cache) -> list[Pair]:
    """Return the cache's validation pairs.

    Raises:
        ShardError: a record is missing or damaged.
    """
    reader = cache.validation
    pairs = []
    for shard, slot in reader.locations():
        record = cache.pair(shard, slot)
        pairs.append(
            Pair(
                prompt=str(reader.metadata(shard, slot).get("prompt", "")),
                conditioning_image=record["conditioning_image"][:3],
                conditioning_latent=record["conditioning_latent"],
                conditioning_mask=record.get("conditioning_mask"),
                embeds=record_embeds(record),
                pooled=record["pooled_embeds"],
            )
        )
    return pairs


def negative_embeds(cache: Cache) -> tuple[Tensor, Tensor]:
    """Return the empty prompt's embeddings [T, W] and pooled embedding [W]."""
    record = cache.empty_prompt()
    return record_embeds(record), record["pooled_embeds"]


@torch.no_grad()
def sample(
    transformer: Any,
    controlnet: Any,
    scheduler: FlowMatchEulerDiscreteScheduler,
    pair: Pair,
    negative: tuple[Tensor, Tensor],
    noise: Tensor,
    settings: Objective,
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Return the latents of pictures, as the stock pipeline's denoising loop computes them.

    Args:
        transformer: SD3 transformer; the loop computes in its dtype.
        controlnet: called as the stock pipeline calls it.
        scheduler: of the base model; its state is overwritten.
        pair: what to draw.
        negative: the empty prompt's embeddings [T, W] and pooled embedding [W].
        noise: standard normal, [B, C, h, w], on the transformer's device.
        settings: how conditioning latents are scaled, and the ControlNet's convention.
        num_inference_steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 or less turns it off.

    Returns:
        Scaled latents, [B, C, h, w], float32.
    """
    guided = guidance_scale > 1

    def batch(conditional: Tensor, unconditional: Tensor) -> Tensor:
        stacked = torch.stack([unconditional, conditional] if guided else [conditional])
        return stacked.to(noise.device, transformer.dtype).repeat_interleave(len(noise), dim=0)

    alone = control_of(pair.conditioning_latent, pair.conditioning_mask, settings)
    control = batch(alone, alone)
    embeds = batch(pair.embeds, negative[0])
    pooled = batch(pair.pooled, negative[1])
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise.to(transformer.dtype)
    for timestep in scheduler.timesteps:
        hidden = torch.cat([latents] * 2) if guided else latents
        velocity = run_networks(
            controlnet,
            transformer,
            settings,
            control=control,
            noisy=hidden,
            timestep=timestep.expand(len(hidden)),
            embeds=embeds,
            pooled=pooled,
        )
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.float()
