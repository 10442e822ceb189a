"""Activations that the backward pass computes again, so that they need not be stored.

Recomputation repeats a block's forward pass from its inputs. With `selective` it leaves out what
takes much arithmetic for each byte of its result: attention, and the feed-forward's second product,
whose sums are four times as long as those of the other products.
"""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten: Any = torch.ops.aten
# Attention, by what computes it.
ATTENTION = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# Products of two matrices, and where these are among the arguments.
PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}


def checkpoint_blocks(network: Any, *, selective: bool) -> None:
    """Store the inputs of a network's blocks instead of their activations, in place.

    Args:
        network: the base's transformer or a ControlNet.
        selective: whether to store also what is dear to compute again.
    """
    network.enable_gradient_checkpointing(_checkpoint_selectively if selective else None)


def _checkpoint_selectively(block: Any, *inputs: Any) -> Any:
    """Call a block as its network does."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block.__call__, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(_context: Any, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    """Return whether to store what an operator of a block computes."""
    stored = operator in ATTENTION
    if operator in PRODUCTS:
        left, right = (arguments[place] for place in PRODUCTS[operator])
        stored = left.shape[1] > right.shape[1]  # sums longer than their results are wide
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE
