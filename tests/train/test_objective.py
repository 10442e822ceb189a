"""The objective against diffusers' own functions and numbers worked by hand."""

import math

import pytest
import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)

from train import objective

SCHEMES = ["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_density_equals_diffusers(scheme: str) -> None:
    torch.manual_seed(1)
    expected = compute_density_for_timestep_sampling(
        scheme, batch_size=1000, logit_mean=0.3, logit_std=1.4, mode_scale=1.1
    )
    torch.manual_seed(1)
    normal = torch.randn(1000)
    torch.manual_seed(1)
    uniform = torch.rand(1000)
    density = objective.timestep_density(
        uniform, normal, scheme, logit_mean=0.3, logit_std=1.4, mode_scale=1.1
    )
    torch.testing.assert_close(density, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_equal_diffusers(scheme: str) -> None:
    sigma = torch.linspace(0.01, 1, 50)
    expected = compute_loss_weighting_for_sd3(scheme, sigmas=sigma)
    torch.testing.assert_close(objective.loss_weight(sigma, scheme), expected)


def test_densities_by_hand() -> None:
    half = torch.tensor([0.5])
    # cos^2(pi / 4) = 1/2: 1 - 1/2 - s (1/2 - 1 + 1/2) = 1/2 whatever the scale.
    assert objective.timestep_density(half, half, "mode", mode_scale=1.29).item() == 0.5
    one = objective.timestep_density(half, torch.tensor([1.0]), "logit_normal", logit_mean=1.0)
    assert one.item() == pytest.approx(1 / (1 + math.exp(-2)))


def test_schedule_indices_stay_in_the_table() -> None:
    density = torch.tensor([-0.1, 0.0, 0.0019, 0.5, 0.9999, 1.0])
    assert objective.schedule_index(density, 1000).tolist() == [0, 0, 1, 500, 999, 999]


def test_noised_by_hand() -> None:
    latent = torch.full((3, 1, 1, 1), 2.0)
    noise = torch.full((3, 1, 1, 1), -6.0)
    mixed = objective.noised(latent, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.flatten().tolist() == [2.0, 0.0, -6.0]


def test_scaled_undoes_what_the_decoder_is_given() -> None:
    raw = torch.randn(4)
    scaled = objective.scaled(raw, 1.5305, 0.0609)
    torch.testing.assert_close(scaled / 1.5305 + 0.0609, raw)


@pytest.mark.parametrize("precondition", [True, False])
def test_the_right_velocity_has_no_loss(precondition: bool) -> None:
    latent, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma = torch.tensor([0.3, 0.8])
    noisy = objective.noised(latent, noise, sigma)
    loss = objective.flow_loss(
        noise - latent,
        latent,
        noise,
        noisy,
        sigma,
        torch.ones(2),
        precondition_outputs=precondition,
    )
    assert loss.tolist() == pytest.approx([0, 0], abs=1e-10)


def test_losses_by_hand() -> None:
    # Two samples of one number; velocities off by 1 and 2, sigma 1/2 and 1, weights 1 and 3.
    latent, noise = torch.tensor([1.0, -1.0]), torch.tensor([3.0, 2.0])
    shape = (2, 1, 1, 1)
    latent, noise = latent.view(shape), noise.view(shape)
    sigma, weight = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 3.0])
    prediction = noise - latent + torch.tensor([1.0, 2.0]).view(shape)
    noisy = objective.noised(latent, noise, sigma)
    plain, preconditioned = (
        objective.flow_loss(
            prediction, latent, noise, noisy, sigma, weight, precondition_outputs=on
        ).tolist()
        for on in (False, True)
    )
    assert plain == pytest.approx([1 * 1, 3 * 4])
    assert preconditioned == pytest.approx([1 * 1 / 4, 3 * 4])
