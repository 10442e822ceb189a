"""One step's loss: a batch through the two networks, held against the objective.

Axes: B samples, C latent channels, h x w latent grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shards.manifest import LatentSpec
from train import objective
from train.data import Batch, prompt_embeds


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


def batch_loss(batch: Batch, controlnet: Any, transformer: Any, settings: Objective) -> Tensor:
    """Return the loss of a batch, a scalar in float32.

    Args:
        batch: on the networks' device.
        controlnet: trained; gets float32 and casts as its autocast says.
        transformer: frozen; gets its own dtype.
        settings: of the objective.
    """
    dtype = transformer.dtype
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
    latent = _scaled(batch.latent, settings.latent_spec)
    conditioning = _scaled(batch.conditioning_latent, settings.conditioning_spec)
    noisy = objective.noised(latent, batch.noise, sigma)
    common = {
        "hidden_states": noisy.to(dtype),
        "timestep": timestep,
        "encoder_hidden_states": prompt_embeds(batch.clip_embeds, batch.t5_embeds).to(dtype),
        "pooled_projections": batch.pooled_embeds.to(dtype),
        "return_dict": False,
    }
    residuals = controlnet(controlnet_cond=conditioning.to(dtype), **common)[0]
    residuals = [residual.to(dtype) for residual in residuals]
    prediction = transformer(block_controlnet_hidden_states=residuals, **common)[0]
    return objective.flow_loss(
        prediction,
        latent,
        batch.noise,
        noisy,
        sigma,
        objective.loss_weight(sigma, settings.weighting_scheme),
        precondition_outputs=settings.precondition_outputs,
    )


def _scaled(latent: Tensor, spec: LatentSpec) -> Tensor:
    return objective.scaled(latent.to(torch.float32), spec.scaling_factor, spec.shift_factor)
