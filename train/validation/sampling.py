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
from train.objective import scaled


@dataclass(frozen=True)
class Pair:
    """A validation pair, as cached.

    Attributes:
        prompt: its text.
        conditioning_image: [3, H, W], 0 to 255.
        conditioning_latent: scaled, [C, h, w].
        embeds: CLIP and T5 embeddings of the prompt, [T, W].
        pooled: pooled embedding of the prompt, [W].
    """

    prompt: str
    conditioning_image: Tensor
    conditioning_latent: Tensor
    embeds: Tensor
    pooled: Tensor


def read_pairs(cache: Cache) -> list[Pair]:
    """Return the cache's validation pairs.

    Raises:
        ShardError: a record is missing or damaged.
    """
    reader, spec = cache.validation, cache.conditioning_spec
    pairs = []
    for shard, slot in reader.locations():
        record = reader.tensors(shard, slot)
        latent = record["conditioning_latent"].float()
        pairs.append(
            Pair(
                prompt=str(reader.metadata(shard, slot).get("prompt", "")),
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
    """Return the latents of pictures, as the stock pipeline's denoising loop computes them.

    Args:
        transformer: SD3 transformer; the loop computes in its dtype.
        controlnet: called as the stock pipeline calls it.
        scheduler: of the base model; its state is overwritten.
        pair: what to draw.
        negative: the empty prompt's embeddings [T, W] and pooled embedding [W].
        noise: standard normal, [B, C, h, w], on the transformer's device.
        num_inference_steps: number of denoising steps.
        guidance_scale: scale of classifier-free guidance; 1 or less turns it off.

    Returns:
        Scaled latents, [B, C, h, w], float32.
    """
    guided = guidance_scale > 1

    def batch(conditional: Tensor, unconditional: Tensor) -> Tensor:
        stacked = torch.stack([unconditional, conditional] if guided else [conditional])
        return stacked.to(noise.device, transformer.dtype).repeat_interleave(len(noise), dim=0)

    conditioning = batch(pair.conditioning_latent, pair.conditioning_latent)
    prompt = {
        "encoder_hidden_states": batch(pair.embeds, negative[0]),
        "pooled_projections": batch(pair.pooled, negative[1]),
    }
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise.to(transformer.dtype)
    for timestep in scheduler.timesteps:
        hidden = torch.cat([latents] * 2) if guided else latents
        velocity = _velocity(transformer, controlnet, hidden, timestep, conditioning, prompt)
        if guided:
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.float()


def _velocity(
    transformer: Any,
    controlnet: Any,
    hidden: Tensor,
    timestep: Tensor,
    conditioning: Tensor,
    prompt: dict[str, Tensor],
) -> Tensor:
    """Return the velocity that the networks predict for latents, [N, C, h, w]."""
    common = {
        "hidden_states": hidden,
        "timestep": timestep.expand(len(hidden)),
        "return_dict": False,
        **prompt,
    }
    residuals = controlnet(controlnet_cond=conditioning, **common)[0]
    velocity: Tensor = transformer(block_controlnet_hidden_states=residuals, **common)[0]
    return velocity
