"""A batch through the two networks, held against the objective.

Axes: B samples, C latent channels, h x w latent grid.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd3.prompt_embeds import prompt_embeds
from shards.format.specs import LatentSpec
from train import objective
from train.data import Batch, NoisySamples


@dataclass(frozen=True)
class Objective:
    """The settings of the objective, and the base scheduler's tables on the device.

    Attributes:
        sigmas: by schedule index, from 1 (noise) down, [N].
        timesteps: what the networks are told, by schedule index, [N].
        latent_spec: scaling of latents.
        conditioning_spec: scaling of conditioning latents.
        weighting_scheme: see `train.objective`.
        logit_mean: likewise.
        logit_std: likewise.
        mode_scale: likewise.
        precondition_outputs: likewise.
    """

    sigmas: Tensor
    timesteps: Tensor
    latent_spec: LatentSpec
    conditioning_spec: LatentSpec
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    precondition_outputs: bool


class Prediction(NamedTuple):
    """What the networks said of noised latents; each [B, C, h, w], float32 but the velocity.

    Attributes:
        velocity: predicted, in the transformer's dtype.
        noisy: what it was predicted from.
        latent: scaled, without noise.
    """

    velocity: Tensor
    noisy: Tensor
    latent: Tensor


def batch_losses(batch: Batch, controlnet: Any, transformer: Any, settings: Objective) -> Tensor:
    """Return the loss of each sample of a batch, [B], float32.

    Args:
        batch: on the networks' device.
        controlnet: see `predict`.
        transformer: likewise.
        settings: of the objective.
    """
    density = objective.timestep_density(
        batch.uniform,
        batch.normal,
        settings.weighting_scheme,
        logit_mean=settings.logit_mean,
        logit_std=settings.logit_std,
        mode_scale=settings.mode_scale,
    )
    index = objective.schedule_index(density, len(settings.sigmas))
    sigma, timestep = settings.sigmas[index], settings.timesteps[index]
    found = predict(batch, sigma, timestep, controlnet, transformer, settings)
    return objective.flow_loss(
        found.velocity,
        found.latent,
        batch.noise,
        found.noisy,
        sigma,
        objective.loss_weight(sigma, settings.weighting_scheme),
        precondition_outputs=settings.precondition_outputs,
    )


def predict(
    samples: NoisySamples,
    sigma: Tensor,
    timestep: Tensor,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
) -> Prediction:
    """Return what the two networks say of samples noised to some level.

    Args:
        samples: on the networks' device.
        sigma: noise levels, [B].
        timestep: what the networks are told of them, [B].
        controlnet: gets float32 and casts as its autocast says.
        transformer: frozen; gets its own dtype.
        settings: how latents are scaled.
    """
    dtype = transformer.dtype
    latent = _scaled(samples.latent, settings.latent_spec)
    conditioning = _scaled(samples.conditioning_latent, settings.conditioning_spec)
    noisy = objective.noised(latent, samples.noise, sigma)
    common = {
        "hidden_states": noisy.to(dtype),
        "timestep": timestep,
        "encoder_hidden_states": prompt_embeds(samples.clip_embeds, samples.t5_embeds).to(dtype),
        "pooled_projections": samples.pooled_embeds.to(dtype),
        "return_dict": False,
    }
    residuals = controlnet(controlnet_cond=conditioning.to(dtype), **common)[0]
    residuals = [residual.to(dtype) for residual in residuals]
    velocity = transformer(block_controlnet_hidden_states=residuals, **common)[0]
    return Prediction(velocity, noisy, latent)


def _scaled(latent: Tensor, spec: LatentSpec) -> Tensor:
    return objective.scaled(latent.to(torch.float32), spec.scaling_factor, spec.shift_factor)
