"""Sampling from cached embeddings, as the stock pipeline samples.

Axes: B pictures, C latent channels, h x w latent grid, T tokens, W embedding width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sd3.prompt_embeds import record_embeds
from shards.reading.cache import Cache
from train.objective import scaled


@dataclass(frozen=True)
class Pair:
    """A validation pair, as cached.

    Attributes:
        prompt: its text.
        conditioning_image: [3, H, W], 0 to 255.
        conditioning_latent: scaled, [C, h, w].
        embeds: [T, W], CLIP and T5.
        pooled: [W].
    """

    prompt: str
    conditioning_image: Tensor
    conditioning_latent: Tensor
    embeds: Tensor
    pooled: Tensor


def read_pairs(cache: Cache) -> list[Pair]:
    """Return the cache's validation pairs."""
    reader, spec = cache.validation, cache.conditioning_spec
    pairs = []
    for place in reader.locations():
        record = reader.tensors(*place)
        latent = record["conditioning_latent"].float()
        pairs.append(
            Pair(
                prompt=str(reader.metadata(*place).get("prompt", "")),
                conditioning_image=record["conditioning_image"],
                conditioning_latent=scaled(latent, spec.scaling_factor, spec.shift_factor),
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
    *,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Return the latents that the stock pipeline's denoising loop comes to.

    Args:
        transformer: SD3 transformer; its dtype is the loop's.
        controlnet: called as the stock pipeline calls it.
        scheduler: of the base model; its state is overwritten.
        pair: what to draw.
        negative: see `negative_embeds`.
        noise: standard normal, [B, C, h, w], on the transformer's device.
        num_inference_steps: steps.
        guidance_scale: of classifier-free guidance; at 1 or less the negative prompt is left out.

    Returns:
        Scaled latents, [B, C, h, w], float32.
    """
    device, dtype = noise.device, transformer.dtype
    guided = guidance_scale > 1
    count = len(noise)

    def rows(positive: Tensor, other: Tensor) -> Tensor:
        both = torch.stack([other, positive] if guided else [positive])
        return both.to(device, dtype).repeat_interleave(count, dim=0)

    embeds = rows(pair.embeds, negative[0])
    pooled = rows(pair.pooled, negative[1])
    conditioning = rows(pair.conditioning_latent, pair.conditioning_latent)
    scheduler.set_timesteps(num_inference_steps, device=device)
    latents = noise.to(dtype)
    for timestep in scheduler.timesteps:
        hidden = torch.cat([latents] * 2) if guided else latents
        common = {
            "hidden_states": hidden,
            "timestep": timestep.expand(len(hidden)),
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "return_dict": False,
        }
        residuals = controlnet(controlnet_cond=conditioning, **common)[0]
        residuals = [residual.to(dtype) for residual in residuals]
        velocity = transformer(block_controlnet_hidden_states=residuals, **common)[0]
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.float()
