"""The loss of a batch: both networks run on noised samples, and the objective compares.

Axes: B samples, C latent channels, h x w latent grid.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd3.prompt_embeds import prompt_embeds
from shards.format.specs import LatentSpec
from train import objective
from train.config import TrainConfig
from train.data import Batch, EncodedSamples


@dataclass(frozen=True)
class Objective:
    """The settings of the objective, and the base scheduler's tables on the device.

    Attributes:
        sigmas: noise levels by schedule index, from 1 (noise) down, [N].
        timesteps: the networks' timestep input by schedule index, [N].
        latent_spec: scaling of latents.
        conditioning_spec: scaling of conditioning latents.
        weighting_scheme: how timesteps are drawn and losses weighted: `sigma_sqrt`,
            `logit_normal`, `mode`, `cosmap` or `none`.
        logit_mean: mean of the logit, for `logit_normal`.
        logit_std: standard deviation of the logit, for `logit_normal`.
        mode_scale: how far from uniform `mode` is.
        precondition_outputs: compare clean latents; otherwise velocities.
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

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        *,
        sigmas: Tensor,
        timesteps: Tensor,
        latent_spec: LatentSpec,
        conditioning_spec: LatentSpec,
    ) -> "Objective":
        """Return the objective that the settings ask for, with these tables and scalings."""
        return cls(
            sigmas=sigmas,
            timesteps=timesteps,
            latent_spec=latent_spec,
            conditioning_spec=conditioning_spec,
            weighting_scheme=config.weighting_scheme,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            precondition_outputs=bool(config.precondition_outputs),
        )


class Prediction(NamedTuple):
    """A prediction of the networks, and what it was made from; each [B, C, h, w].

    Attributes:
        velocity: predicted, in the transformer's dtype.
        noisy: the noised latents that it was predicted from, float32.
        latent: scaled latents without noise, float32.
    """

    velocity: Tensor
    noisy: Tensor
    latent: Tensor


def batch_losses(batch: Batch, controlnet: Any, transformer: Any, settings: Objective) -> Tensor:
    """Return the loss of each sample of a batch, [B], float32.

    Args:
        batch: on the networks' device.
        controlnet: gets the transformer's dtype and computes in it.
        transformer: frozen; gets its own dtype.
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
    velocity, noisy, latent = predict(batch, sigma, timestep, controlnet, transformer, settings)
    return objective.flow_loss(
        velocity,
        latent,
        batch.noise,
        noisy,
        sigma,
        objective.loss_weight(sigma, settings.weighting_scheme),
        precondition_outputs=settings.precondition_outputs,
    )


def predict(
    samples: EncodedSamples,
    sigma: Tensor,
    timestep: Tensor,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
) -> Prediction:
    """Return the velocity that the two networks predict at given noise levels.

    Args:
        samples: on the networks' device.
        sigma: noise levels, [B].
        timestep: the networks' timestep input for these levels, [B].
        controlnet: gets the transformer's dtype and computes in it.
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
    velocity = transformer(block_controlnet_hidden_states=residuals, **common)[0]
    return Prediction(velocity, noisy, latent)


def _scaled(latent: Tensor, spec: LatentSpec) -> Tensor:
    return objective.scaled(latent.to(torch.float32), spec.scaling_factor, spec.shift_factor)
