"""How blocks of the picture alone start from the base's joint blocks.

They have the names and sizes of the joint blocks' picture stream, with two exceptions.
"""

from typing import Any

from torch import Tensor, nn

NORM = ".norm1.linear."


def of_one_attention(name: str, weight: Tensor, rows: int) -> Tensor:
    """Return a weight of the base as a block with one attention has it.

    SD3.5-medium's first blocks have two. What their first norm computes for the second comes last,
    in rows that are left out.

    Args:
        name: the weight's.
        weight: the base's.
        rows: of the block's own.
    """
    return weight[:rows] if NORM in name else weight


def queries_and_keys_anew(controlnet: Any) -> dict[str, Tensor]:
    """Return weights of queries and keys as torch starts them, by their names in a ControlNet.

    For bases that normalise queries and keys, as SD3.5 does. These blocks do not, and the products
    of copies would not have the size that attention expects.
    """
    anew = {}
    for index, block in enumerate(controlnet.transformer_blocks):
        for part in ("to_q", "to_k"):
            layer = getattr(block.attn, part)
            started = nn.Linear(layer.in_features, layer.out_features).state_dict()
            for name, weight in started.items():
                anew[f"transformer_blocks.{index}.attn.{part}.{name}"] = weight
    return anew
