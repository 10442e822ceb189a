"""What the trainings of VAE and transformer share: a state that resumes, and averaged weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def load_state(path: Path, parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Load a saved state into the parts of a training; return all of it.

    Args:
        path: the file; if there is none, the parts stay as they are and the result is empty.
        parts: models, optimiser and learning rate schedule, by name.
        device: of the parts.
    """
    if not path.is_file():
        return {}
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save a training state, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def states_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the states of a training's parts, by name."""
    return {name: part.state_dict() for name, part in parts.items()}


@torch.no_grad()
def update_average(
    average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float
) -> None:
    """Update the exponential moving average of a model's weights.

    Args:
        average: a copy of the model that holds the averages.
        model: the model after a step.
        step: the step's number, from 0; in early steps the decay is lower.
        decay: the share of the old average that stays.
    """
    decay = min(decay, (step + 1) / (step + 10))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
