"""The frozen transformer in 8 or 4 bit.

Weights alone, of the linear layers in its blocks, which hold nearly all of them; arithmetic and
activations stay in the precision that the rest has. Gradients pass through to the ControlNet.
"""

from typing import Any

import torch
from torch import nn

from shards.errors import ConfigError

PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def quantize(transformer: Any, kind: str) -> None:
    """Quantise a transformer in place; 4 bit ones when they are moved to their device.

    Args:
        transformer: an SD3 transformer, frozen.
        kind: `int8` or `fp8` (E4M3), with a scale for each row; `nf4` with one for 64 weights,
            Dettmers et al. 2023, arXiv:2305.14314.

    Raises:
        ConfigError: the installed library cannot do it.
    """
    blocks = transformer.transformer_blocks
    if kind == "nf4":
        _use_nf4(blocks)
        return
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]
    try:
        quantize_(blocks, config())
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--quantize-base {kind}: torchao cannot here ({reason}).") from error


def _use_nf4(module: nn.Module) -> None:
    """Put bitsandbytes' 4 bit layers in the place of all linear ones."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            _use_nf4(child)
            continue
        with torch.device("meta"):
            layer = Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=child.weight.dtype,
                quant_type="nf4",
            )
        layer.weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
        if child.bias is not None:
            layer.bias = nn.Parameter(child.bias.data, requires_grad=False)
        setattr(module, name, layer)
