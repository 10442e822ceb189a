"""Float32 weights that are cast to 16 bit where they are used, as all else is in 16 bit already.

Autocast casts weights too. But it also computes norms in float32, casts their output anew for each
layer that takes it, keeps every copy for the backward pass, and returns residuals in float32.
"""

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A linear layer that computes in the number format of its inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] from [..., in]."""
        weight, bias = _cast(self, inputs.dtype)
        return nn.functional.linear(inputs, weight, bias)


class CastConv2d(nn.Conv2d):
    """A convolution that computes in the number format of its inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [B, out, h, w] from [B, in, H, W]."""
        weight, bias = _cast(self, inputs.dtype)
        outputs: Tensor = self._conv_forward(inputs, weight, bias)
        return outputs


class CastRMSNorm(RMSNorm):  # type: ignore[misc]
    """diffusers' norm, which computes in float32, with outputs in the number format of inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs shaped like inputs."""
        outputs: Tensor = super().forward(inputs)
        return outputs.to(inputs.dtype)


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: CastLinear,
    nn.Conv2d: CastConv2d,
    RMSNorm: CastRMSNorm,
}


def cast_weights_at_use(network: nn.Module) -> None:
    """Let a network compute in the number format of its inputs, whatever its weights are in.

    Weights, their names and their gradients stay as they are.
    """
    for module in network.modules():
        if type(module) in KINDS:
            module.__class__ = KINDS[type(module)]
        else:
            assert not list(module.parameters(recurse=False)), type(module)


def _cast(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    bias = layer.bias
    return layer.weight.to(dtype), None if bias is None else bias.to(dtype)
