"""The frozen transformer in 8 or 4 bit.

Only the linear layers of its blocks are quantized; they hold nearly all of the weights. Activations
keep their number format. Gradients pass through to the ControlNet; the backward pass stores the
quantized weights only, where libraries' layers for inference store unpacked copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def quantize(transformer: Any, kind: str, device: torch.device | None = None) -> None:
    """Quantize a transformer in place; `nf4` takes effect when it is moved to its device.

    Args:
        transformer: an SD3 transformer, frozen.
        kind: `int8` or `fp8` (E4M3), with one scale per row; `nf4` with one scale per 64 weights,
            Dettmers et al. 2023, arXiv:2305.14314.
        device: where to compute `int8` and `fp8`, a layer at a time; by default where the layer is.
            The quantized layer lies where the layer lay.
    """
    if kind == "nf4":
        replace_linear(transformer, _nf4)
    else:
        replace_linear(transformer, lambda layer: RowLinear(layer, DTYPES[kind], device))


def replace_linear(transformer: Any, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace each linear layer in a transformer's blocks by what `replacement` returns for it."""
    for block in transformer.transformer_blocks:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                block.set_submodule(name, replacement(layer))


class RowLinear(nn.Module):
    """A frozen linear layer in 8 bit with one scale per row.

    Args:
        linear: the layer to quantize.
        dtype: int8 or float8_e4m3fn.
        device: where to compute; by default where the layer is.
    """

    values: Tensor
    scale: Tensor

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        weight = linear.weight.detach()
        values, scale = rounded_rows(weight.to(device or weight.device), dtype)
        self.register_buffer("values", values.to(weight.device))
        self.register_buffer("scale", scale.to(weight.device))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] from [..., in]."""
        return _Product.apply(inputs, self.values, self.scale, self.bias)  # type: ignore[no-any-return,no-untyped-call]


def rounded_rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix in 8 bit, [R, C], and the scale of each row, [R, 1] float32.

    Each row's largest magnitude becomes the largest of the format.
    """
    exact = matrix.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST[dtype]
    scaled = exact / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def unpacked(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix that `rounded_rows` rounded, in a number format of 16 bit or more."""
    if values.dtype == torch.int8:  # in one kernel
        return torch.mul(values, scale, out=values.new_empty(values.shape, dtype=dtype))
    # torch multiplies no float8. 16 bit formats represent it exactly.
    return values.to(dtype).mul_(scale)


class _Product(torch.autograd.Function):
    """A linear layer's outputs. Its backward pass unpacks the weight again instead of storing it.

    The weight is scaled, not the outputs: of a picture of 1024 px these are 2.7 times as large in
    SD3 medium, and of eight pictures 21 times.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.values, ctx.scale = values, scale
        return nn.functional.linear(inputs, unpacked(values, scale, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        return gradient @ unpacked(ctx.values, ctx.scale, gradient.dtype), None, None, None


def _nf4(linear: nn.Linear) -> nn.Module:
    """Return bitsandbytes' 4 bit layer with the weights of a linear layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer: nn.Module = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
        )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return layer
