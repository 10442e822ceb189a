"""Whether a network's weights are numbers: with one NaN among them, all that it computes is NaN."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.errors import ConfigError


def nonfinite_weight(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first weight that holds a NaN or an infinity, or None."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel():
            numbers = weight.detach()
            if numbers.element_size() == 1:  # torch compares no 8 bit numbers
                numbers = numbers.half()
            # Both are NaN if any number is. Unlike isfinite, this makes no tensor of that size.
            least, largest = torch.aminmax(numbers)
            if not torch.isfinite(torch.stack((least, largest))).all():
                return name
    return None


def nonfinite_weight_in(folder: Path) -> tuple[Path, str] | None:
    """Return file and name of the first weight on disk that is not finite, or None.

    Args:
        folder: of a network, with safetensors files.

    Raises:
        SafetensorError: a file is damaged.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            name = nonfinite_weight((name, file.get_tensor(name)) for name in names)
        if name is not None:
            return path, name
    return None


def check_finite(network: nn.Module, what: str) -> None:
    """Check that all weights of a network just loaded are finite.

    Args:
        network: its weights and buffers are looked at.
        what: the option and the folder or name that it was loaded from.

    Raises:
        ConfigError: one is not; names it.
    """
    if (name := nonfinite_weight(network.state_dict().items())) is not None:
        raise ConfigError(
            f"{what}: the weight {name} is not finite, so the network gives nothing but NaN. "
            "Take an earlier checkpoint, or fetch the file again."
        )
