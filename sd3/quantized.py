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


def quantize(transformer: Any, kind: str, *, fp8_matmul: bool = False) -> None:
    """Quantize a transformer in place; `nf4` takes effect when it is moved to its device.

    Args:
        transformer: an SD3 transformer, frozen.
        kind: `int8` or `fp8` (E4M3), with one scale per row; `nf4` with one scale per 64 weights,
            Dettmers et al. 2023, arXiv:2305.14314.
        fp8_matmul: whether to compute matrix products in 8 bit, for `fp8`.
    """
    if kind == "nf4":
        replace_linear(transformer, _nf4)
    else:
        replace_linear(transformer, lambda layer: RowLinear(layer, DTYPES[kind], fp8_matmul))


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
        fp8_matmul: whether to compute products in 8 bit.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, fp8_matmul: bool) -> None:
        super().__init__()
        self.product = _Fp8Product if fp8_matmul else _Product
        values, scale = rounded_rows(linear.weight.detach(), dtype)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [..., out] from [..., in]."""
        outputs: Tensor = self.product.apply(inputs, self.values, self.scale)  # type: ignore[no-untyped-call]
        return outputs if self.bias is None else outputs + self.bias


def rounded_rows(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a matrix in 8 bit, [R, C], and the scale of each row, [R, 1] float32.

    Each row's largest magnitude becomes the largest of the format.
    """
    exact = matrix.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / LARGEST[dtype]
    scaled = exact / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


class _Product(torch.autograd.Function):
    """Inputs times quantized rows, which 16 bit formats represent exactly; then the scales."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.values, ctx.scale = values, scale
        weight, row = values.t().to(inputs.dtype), scale.t().to(inputs.dtype)
        # Products of numbers up to 448 overflow float16.
        return inputs @ (weight * row) if inputs.dtype == torch.float16 else inputs @ weight * row

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        dtype = gradient.dtype
        return gradient * ctx.scale.t().to(dtype) @ ctx.values.to(dtype), None, None


class _Fp8Product(torch.autograd.Function):
    """Inputs times quantized rows, with inputs and gradients also rounded to 8 bit by row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.values, ctx.scale = values, scale
        return _fp8_product(inputs, values.t(), scale.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        # The sum runs over the rows, so their scales are applied to the gradient first.
        gradient = gradient * ctx.scale.t().to(gradient.dtype)
        # The hardware needs the second matrix in column-major order.
        values = ctx.values.t().contiguous().t()
        ones = ctx.scale.new_ones(1, values.shape[1])
        return _fp8_product(gradient, values, ones), None, None


def _fp8_product(inputs: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """Return [..., N] from inputs [..., K], 8 bit values [K, N] and column scales [1, N]."""
    rounded, row_scale = rounded_rows(inputs.flatten(0, -2), torch.float8_e4m3fn)
    product = torch._scaled_mm(
        rounded,
        values,
        scale_a=row_scale,
        scale_b=scale.contiguous(),
        out_dtype=torch.bfloat16,
    )
    return product.view(*inputs.shape[:-1], -1).to(inputs.dtype)


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
