"""Choosing the device that a stage computes on."""

import torch

from shards.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """Return the device by name, or the best there is.

    Raises:
        ConfigError: torch knows no such device here.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not available here ({reason}).") from error
    return device
