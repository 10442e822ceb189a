"""The loss of a batch: both networks run on noised samples, and the objective compares.

Axes: B samples, C latent channels, h x w latent grid.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd3.controlnet.kinds import ControlNetKind
from sd3.controlnet.pooled_projection import PooledProjection
from sd3.prompt_embeds import prompt_embeds
from shards.format.specs import LatentSpec
from train import objective
from train.config import DROPPED, TrainConfig
from train.data import Batch, EncodedSamples
from train.objective import UNCHANGED, Timesteps


@dataclass(frozen=True)
class Objective:
    """The settings of the objective, and the base scheduler's tables on the device.

    Attributes:
        sigmas: noise levels by schedule index, from 1 (noise) down, [N].
        timesteps: the networks' timestep input by schedule index, [N].
        latent_spec: scaling of latents.
        conditioning_spec: scaling of conditioning latents.
        pooled_projection: the ControlNet's convention; with `zeros`, `conditioning_spec`'s shift is
            left out.
        controlnet_kind: what the ControlNet's blocks read.
        weighting_scheme: how timesteps are drawn and losses weighted: `sigma_sqrt`,
            `logit_normal`, `mode`, `cosmap` or `none`.
        logit_mean: mean of the logit, for `logit_normal`.
        logit_std: standard deviation of the logit, for `logit_normal`.
        mode_scale: how far from uniform `mode` is.
        precondition_outputs: compare clean latents; otherwise velocities.
        schedule: how the tables are shifted, and which part of them is drawn.
    """

    sigmas: Tensor
    timesteps: Tensor
    latent_spec: LatentSpec
    conditioning_spec: LatentSpec
    pooled_projection: PooledProjection
    controlnet_kind: ControlNetKind
    weighting_scheme: str
    logit_mean: float
    logit_std: float
    mode_scale: float
    precondition_outputs: bool
    schedule: Timesteps = UNCHANGED

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        *,
        sigmas: Tensor,
        timesteps: Tensor,
        latent_spec: LatentSpec,
        conditioning_spec: LatentSpec,
        pooled_projection: PooledProjection,
        controlnet_kind: ControlNetKind = "joint",
        schedule: Timesteps = UNCHANGED,
    ) -> "Objective":
        """Return the objective of the settings, with these tables, scalings and convention."""
        return cls(
            sigmas=sigmas,
            timesteps=timesteps,
            latent_spec=latent_spec,
            conditioning_spec=conditioning_spec,
            pooled_projection=pooled_projection,
            controlnet_kind=controlnet_kind,
            weighting_scheme=config.weighting_scheme,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            precondition_outputs=bool(config.precondition_outputs),
            schedule=schedule,
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


def batch_losses(
    batch: Batch,
    controlnet: Any,
    transformer: Any,
    settings: Objective,
    levels: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the loss of each sample of a batch, [B], float32.

    Args:
        batch: on the networks' device.
        controlnet: gets the transformer's dtype and computes in it.
        transformer: frozen; gets its own dtype.
        settings: of the objective.
        levels: of `noise_levels`, where they are known already.
    """
    sigma, timestep = levels or noise_levels(batch, settings)
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


def noise_levels(batch: Batch, settings: Objective) -> tuple[Tensor, Tensor]:
    """Return the noise level of each sample and the networks' timestep input for it, [B] each."""
    schedule, (sigmas, timesteps) = settings.schedule, (settings.sigmas, settings.timesteps)
    shift = schedule.shift_for(*batch.latent.shape[-2:])
    if shift != 1:
        sigmas = objective.shifted(sigmas, shift)
        timesteps = sigmas * len(sigmas)
    uniform, normal = batch.uniform, batch.normal
    scheme: dict[str, Any] = {
        "scheme": settings.weighting_scheme,
        "logit_mean": settings.logit_mean,
        "logit_std": settings.logit_std,
        "mode_scale": settings.mode_scale,
    }
    if (schedule.low, schedule.high) != (0, len(sigmas)):
        first, last = objective.drawn_part(timesteps, schedule.low, schedule.high)
        uniform, normal = objective.restricted(uniform, normal, first=first, last=last, **scheme)
    density = objective.timestep_density(uniform, normal, **scheme)
    index = objective.schedule_index(density, len(sigmas))
    return sigmas[index], timesteps[index]


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
        settings: how latents are scaled, and the ControlNet's convention.
    """
    dtype = transformer.dtype
    latent = _scaled(samples.latent, settings.latent_spec)
    noisy = objective.noised(latent, samples.noise, sigma)
    control = control_of(samples.conditioning_latent, samples.conditioning_mask, settings)
    clip = _kept(samples, "clip", samples.clip_embeds)
    t5 = _kept(samples, "t5", samples.t5_embeds)
    velocity = run_networks(
        controlnet,
        transformer,
        settings,
        control=_kept(samples, "control", control).to(dtype),
        noisy=noisy.to(dtype),
        timestep=timestep,
        embeds=prompt_embeds(clip, t5).to(dtype),
        pooled=_kept(samples, "pooled", samples.pooled_embeds).to(dtype),
    )
    return Prediction(velocity, noisy, latent)


def _kept(samples: EncodedSamples, part: str, tensor: Tensor) -> Tensor:
    """Return a tensor of `DROPPED`, with zeros for the samples that it is dropped from."""
    if samples.kept is None:
        return tensor
    kept = samples.kept[:, DROPPED.index(part)].to(tensor.dtype)
    return tensor * kept.view(-1, *(1,) * (tensor.ndim - 1))


def control_of(latent: Tensor, mask: Tensor | None, settings: Objective) -> Tensor:
    """Return what the ControlNet is controlled by, in float32.

    Args:
        latent: conditioning latents as cached, [..., C, h, w].
        mask: for inpainting, [..., 1, h, w]; see `sd3.inpainting`. The stock inpainting pipeline
            shifts these latents, though it passes zeros for the pooled embedding.
        settings: how conditioning latents are scaled, and the ControlNet's convention.

    Returns:
        [..., C, h, w], or [..., C + 1, h, w] with a mask.
    """
    spec = settings.conditioning_spec
    if settings.pooled_projection == "zeros" and mask is None:
        spec = replace(spec, shift_factor=0.0)
    scaled = _scaled(latent, spec)
    return scaled if mask is None else torch.cat([scaled, mask.to(scaled)], dim=-3)


def run_networks(
    controlnet: Any,
    transformer: Any,
    settings: Objective,
    *,
    control: Tensor,
    noisy: Tensor,
    timestep: Tensor,
    embeds: Tensor,
    pooled: Tensor,
) -> Tensor:
    """Return the velocity that the two networks predict, [B, C, h, w].

    Losses and pictures both come from here, so that they drive the ControlNet alike.

    Args:
        controlnet: of the transformer's dtype, as all tensors but `timestep`.
        transformer: the base's.
        settings: the ControlNet's convention and kind.
        control: of `control_of`, [B, C or C + 1, h, w].
        noisy: noised latents, [B, C, h, w].
        timestep: the networks' timestep input, [B].
        embeds: of the prompts, [B, T, W].
        pooled: of the prompts; the transformer gets it in either convention, [B, W].
    """
    common = {"timestep": timestep, "return_dict": False}
    seen = {"hidden_states": noisy, "encoder_hidden_states": embeds}
    if settings.controlnet_kind == "stability":
        seen_by_control = {"hidden_states": transformer.pos_embed(noisy)}
    else:
        seen_by_control = seen
    of_control = torch.zeros_like(pooled) if settings.pooled_projection == "zeros" else pooled
    residuals = controlnet(
        controlnet_cond=control, pooled_projections=of_control, **seen_by_control, **common
    )[0]
    velocity: Tensor = transformer(
        block_controlnet_hidden_states=residuals, pooled_projections=pooled, **seen, **common
    )[0]
    return velocity


def _scaled(latent: Tensor, spec: LatentSpec) -> Tensor:
    return objective.scaled(latent.to(torch.float32), spec.scaling_factor, spec.shift_factor)
