"""`--offload auto`: whether the text encoders fit the device whole."""

from dataclasses import replace
from typing import Literal

import torch

from precompute.encoding.text_pass import USUAL_BATCH
from precompute.memory.simulation import read_sizes, text_peak
from precompute.planning.context import Context

GB = 1e9
# What CUDA's libraries take beside tensors, and what is lost between them.
MARGIN_BYTES = 1_000_000_000


def choose_offload(context: Context) -> Context:
    """Return the run with `none` or `groups` for `--offload`; say so where it is `groups`.

    On other devices than a GPU, which share their memory with the host, nothing is gained by
    groups; and nothing is computed where no prompt is to be encoded.
    """
    config, products = context.config, context.products
    if config.offload != "auto":
        return context
    chosen: Literal["none", "groups"] = "none"
    if context.device.type == "cuda" and any(
        context.shards_to_build(product) for product in (products.text, products.validation)
    ):
        free, _ = torch.cuda.mem_get_info(context.device)
        batch = USUAL_BATCH if config.text_batch_size == "auto" else config.text_batch_size
        sizes, settings = read_sizes(context.specs.base), context.specs.text_settings
        needed = text_peak(sizes, settings, batch, in_groups=False).total + MARGIN_BYTES
        if needed > free:
            chosen = "groups"
            context.print(
                f"  --offload groups: the text encoders take {needed / GB:.1f} GB whole, and "
                f"{free / GB:.1f} GB of {context.device} are free; T5 visits it layer by layer"
            )
    return replace(context, config=replace(config, offload=chosen))
