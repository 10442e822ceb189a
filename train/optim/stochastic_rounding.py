"""Training weights kept in bfloat16.

A step computes with a float32 copy of one weight at a time. Its result is rounded up or down at
random, so that the mean is exact; rounding to the nearest would lose small updates.
Source: Gupta et al. 2015, arXiv:1502.02551.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.optim.per_weight import UncastState, only_weight


class StochasticRounding(UncastState):
    """Steps weights kept in bfloat16 in float32, with state in float32.

    It goes before an optimiser's class, with one parameter group, and steps one weight at a time.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                with only_weight(group, parameter), in_float32(parameter):
                    super().step()


@contextlib.contextmanager
def in_float32(parameter: Any) -> Iterator[None]:
    """Temporarily convert a bfloat16 weight and its gradient to float32, then round the weight."""
    if parameter.dtype != torch.bfloat16:
        yield
        return
    bf16_weight, bf16_gradient = parameter.data, parameter.grad
    parameter.grad = None
    parameter.data = bf16_weight.float()
    parameter.grad = bf16_gradient.float()
    yield
    exact = parameter.data
    parameter.grad = None
    parameter.data = bf16_weight.copy_(round_stochastically(exact))
    parameter.grad = bf16_gradient


def round_stochastically(exact: Tensor) -> Tensor:
    """Return float32 numbers as bfloat16, each rounded so that its expected value is exact.

    Numbers that are not finite stay as they are.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    # The lower 16 bits carry into the upper ones with a probability in proportion to their value.
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)
