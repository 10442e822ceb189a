"""What a layer in 8 bit computes with, and where it is made."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd3 import quantized
from sd3.quantized import DTYPES, RowLinear, quantize

TOKENS, WIDTH, OUT = 50, 12, 8
# Matrix products, and what writes nothing.
IGNORED = ("mm", "addmm", "detach", "_unsafe_view", "new_empty", "empty")


class Elementwise(TorchDispatchMode):
    """Adds up the numbers that operations other than matrix products write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in IGNORED:
            self.written += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))
        return result


@pytest.mark.parametrize(("kind", "passes"), [("int8", 1), ("fp8", 2)])
def test_weights_are_scaled_and_not_outputs(kind: str, passes: int) -> None:
    layer = RowLinear(nn.Linear(WIDTH, OUT), DTYPES[kind])
    inputs = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with Elementwise() as counted:
        outputs = layer(inputs)
    assert counted.written == passes * WIDTH * OUT
    gradient = torch.ones_like(outputs)
    with Elementwise() as counted:
        outputs.backward(gradient)
    assert counted.written == passes * WIDTH * OUT


@pytest.mark.parametrize("kind", DTYPES)
def test_layers_are_quantised_on_a_device_one_by_one_and_stay_where_they_were(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed_on: list[str] = []

    def rounded_rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        computed_on.append(matrix.device.type)
        return torch.zeros(OUT, WIDTH).to(dtype), torch.zeros(OUT, 1)

    monkeypatch.setattr(quantized, "rounded_rows", rounded_rows)
    network = nn.Module()
    network.transformer_blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(WIDTH, OUT)) for _ in range(2)
    )
    quantize(network, kind, torch.device("meta"))
    assert computed_on == ["meta", "meta"]
    for block in network.transformer_blocks:
        layer: Any = block[0]
        assert layer.values.device.type == layer.scale.device.type == "cpu"
