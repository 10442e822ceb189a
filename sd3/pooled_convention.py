"""What a ControlNet takes beside noise, timestep and prompt: InstantX's convention, and the other.

InstantX's ControlNets were trained with a zero pooled embedding and with conditioning latents that
are scaled but not shifted. The stock pipeline drives a ControlNet so if its configuration has
`force_zeros_for_pooled_projection`, which is also diffusers' default where it says nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3ControlNetModel

FORCE_ZEROS = "force_zeros_for_pooled_projection"
DEFAULTED = "_use_default_values"


def takes_zeros(config: Mapping[str, Any]) -> bool:
    """Return whether the stock pipeline drives a ControlNet of this configuration as InstantX's."""
    return bool(config.get(FORCE_ZEROS, True))


@torch.no_grad()
def take_pooled_and_shift(
    controlnet: SD3ControlNetModel, *, scaling_factor: float, shift_factor: float
) -> None:
    """Convert InstantX's convention to that of the pooled embedding and the shift, in place.

    The ControlNet then computes from the other's inputs what it computed from its own. The pooled
    embedding's first layer gets zero weights, so that it has no say until training changes that.
    The shift, the same number in all channels, goes into the bias of the conditioning's first
    layer, which has no padding: W (x + c) + b = W x + (b + c sum W).

    Args:
        controlnet: its weights in float32.
        scaling_factor: of the VAE.
        shift_factor: of the VAE.
    """
    controlnet.time_text_embed.text_embedder.linear_1.weight.zero_()
    first = controlnet.pos_embed_input.proj
    sums = first.weight.sum(dim=(1, 2, 3), dtype=torch.float64)
    first.bias.copy_(first.bias.double() + shift_factor * scaling_factor * sums)
    # diffusers resets what this names to its defaults when it builds a network from the entries.
    defaults = [name for name in controlnet.config.get(DEFAULTED, ()) if name != FORCE_ZEROS]
    controlnet.register_to_config(**{FORCE_ZEROS: False, DEFAULTED: defaults})
