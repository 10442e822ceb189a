"""Clipping: torch's result, without a pass through the gradients."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.processes.sharding import clip_gradients

RATE = 0.1


class Written(TorchDispatchMode):
    """Adds up the numbers of all tensors that operations return or change."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        in_place = args[0] if func.overloadpacket.__name__.endswith("_") else None
        written = [one for one in tree_leaves((result, in_place)) if isinstance(one, Tensor)]
        self.count += sum(one.numel() for one in written if not func.is_view)
        return result


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("max_norm", "factor"), [(0.0, 1.0), (10.0, 1.0), (0.5, 0.1)])
def test_an_update_is_that_of_the_clipped_gradient(
    max_norm: float, factor: float, fused: bool
) -> None:
    network = nn.Linear(20, 20)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    # AdamW with an epsilon of 1 moves by rate * g / (|g| + 1) at first.
    optimizer = torch.optim.AdamW(
        network.parameters(), RATE, eps=1.0, weight_decay=0.0, fused=fused
    )
    gradients = [torch.randn(parameter.shape) for parameter in network.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    gradients = [gradient * 5 / norm for gradient in gradients]
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    with Written() as written:
        found = clip_gradients(Accelerator(cpu=True), network, optimizer, max_norm)
    if fused or factor == 1:
        assert written.count < 20
    optimizer.step()
    assert float(found) == pytest.approx(5)
    for parameter, old, gradient in zip(network.parameters(), before, gradients, strict=True):
        clipped = gradient * factor
        torch.testing.assert_close(old - parameter, RATE * clipped / (clipped.abs() + 1))
