"""Flow matching for SD3; pure functions, no configuration.

Axes: B samples, C latent channels (16), h x w latent grid (pixels / 8).
Source: Esser et al. 2024, arXiv:2403.03206, section 3; preconditioning after Karras et al. 2022,
arXiv:2206.00364, section 5; shift: Esser et al., section 5.3.2. Sigma is the share of noise: 0 is
data, 1 is noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timesteps:
    """The settings of the schedule.

    Attributes:
        shift: by which the base's schedule is shifted further: 1 leaves it as it is.
        native_cells: cells of a latent grid that the base's own shift is for; with it the shift is
            that of each batch's resolution, and `shift` does not count.
        low: the lowest timestep that is drawn.
        high: the highest.
    """

    shift: float = 1.0
    native_cells: int | None = None
    low: int = 0
    high: int = 1000

    def shift_for(self, height: int, width: int) -> float:
        """Return the shift of the base's schedule for a latent grid."""
        if self.native_cells is None:
            return self.shift
        return math.sqrt(height * width / self.native_cells)


UNCHANGED = Timesteps()


def timestep_density(
    uniform: Tensor,
    normal: Tensor,
    scheme: str,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Return each sample's position in the schedule, 0 (all noise) to 1 (all data).

    Args:
        uniform: uniform in [0, 1), [B].
        normal: standard normal, [B].
        scheme: `logit_normal` (section 3.1, equation 19) uses `normal`; `mode` (equation 20) and
            all others, which are uniform, use `uniform`.
        logit_mean: mean of the logit.
        logit_std: standard deviation of the logit.
        mode_scale: how far from uniform `mode` is.

    Returns:
        [B].
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * normal)
    if scheme == "mode":
        cosine = torch.cos(math.pi * uniform / 2) ** 2
        return 1 - uniform - mode_scale * (cosine - 1 + uniform)
    return uniform


def restricted(
    uniform: Tensor,
    normal: Tensor,
    scheme: str,
    first: Tensor,
    last: Tensor,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> tuple[Tensor, Tensor]:
    """Return the two draws of `timestep_density` anew, so that the density lies within a part.

    Within it the density is as before: the draws are mapped to the quantiles that lead there.

    Args:
        uniform: uniform in [0, 1), [B].
        normal: standard normal, [B].
        scheme: as for `timestep_density`, like the three that follow.
        first: where the part begins, 0 to 1, [].
        last: where it ends, [].
        logit_mean: mean of the logit.
        logit_std: standard deviation of the logit.
        mode_scale: how far from uniform `mode` is.

    Returns:
        `uniform` and `normal`, [B] each; the scheme uses one of them.
    """
    ends = torch.stack([first, last]).double()
    if scheme == "logit_normal":
        ends = torch.special.ndtr((torch.logit(ends) - logit_mean) / logit_std)
        quantile = torch.special.ndtr(normal.double())
        normal = torch.special.ndtri(ends[0] + (ends[1] - ends[0]) * quantile).to(normal)
        return uniform, normal
    if scheme == "mode":
        ends = _mode_quantiles(ends, mode_scale)
    return (ends[0] + (ends[1] - ends[0]) * uniform.double()).to(uniform), normal


def _mode_quantiles(density: Tensor, mode_scale: float) -> Tensor:
    """Return the uniform draws that lead to densities by `mode`, which falls as they rise."""
    low, high = torch.zeros_like(density), torch.ones_like(density)
    for _ in range(40):
        middle = (low + high) / 2
        found = timestep_density(middle, middle, "mode", mode_scale=mode_scale)
        low, high = (
            torch.where(found > density, middle, low),
            torch.where(found > density, high, middle),
        )
    return (low + high) / 2


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Return noise levels after a shift; two shifts in a row are one of their product."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def drawn_part(timesteps: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return which part of the schedule lies between two timesteps, as fractions of it, [] each.

    Args:
        timesteps: of the schedule, descending, [N].
        low: the lowest timestep.
        high: the highest.
    """
    count = len(timesteps)
    return (timesteps > high).sum() / count, (timesteps >= low).sum() / count


def schedule_index(density: Tensor, num_train_timesteps: int) -> Tensor:
    """Return the index into the scheduler's tables for each density, [B], int64."""
    return (density * num_train_timesteps).long().clamp(0, num_train_timesteps - 1)


def scaled(latent: Tensor, scaling_factor: float, shift_factor: float) -> Tensor:
    """Return raw VAE output as the transformer takes it: near mean 0 and variance 1."""
    return (latent - shift_factor) * scaling_factor


def noised(latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the point at `sigma` on the straight line from data to noise.

    Args:
        latent: scaled latents, [B, C, h, w].
        noise: standard normal, shaped like `latent`.
        sigma: one level a sample, [B].

    Returns:
        [B, C, h, w].
    """
    sigma = _spread(sigma)
    return (1 - sigma) * latent + sigma * noise


def loss_weight(sigma: Tensor, scheme: str) -> Tensor:
    """Return the weight of each sample's loss, [B].

    `sigma_sqrt` and `cosmap` (section 3.1, equation 21 as a weight) draw uniformly and weight the
    losses instead; all others weight them equally.
    """
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def flow_loss(
    prediction: Tensor,
    latent: Tensor,
    noise: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    weight: Tensor,
    *,
    precondition_outputs: bool,
) -> Tensor:
    """Return each sample's weighted mean squared error.

    Args:
        prediction: the transformer's velocity, ideally noise - latent; [B, C, h, w].
        latent: scaled latents, [B, C, h, w].
        noise: the noise mixed in, [B, C, h, w].
        noisy: latents with this noise, [B, C, h, w].
        sigma: [B].
        weight: of each sample's loss, [B].
        precondition_outputs: compare clean latents, noisy - sigma * velocity, which weights the
            velocity's error by sigma squared; otherwise compare velocities.

    Returns:
        [B], float32.
    """
    prediction = prediction.float()
    if precondition_outputs:
        error = prediction * -_spread(sigma) + noisy - latent
    else:
        error = prediction - (noise - latent)
    return weight * (error**2).mean(dim=(1, 2, 3))


def _spread(values: Tensor) -> Tensor:
    """Return [B] as [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)
