"""A ControlNet of one convention of the pooled embedding, converted to the other."""

import torch
from diffusers import SD3ControlNetModel

from sd3.controlnet.pooled_projection import FORCE_ZEROS, PooledProjection, pooled_projection_of

DEFAULTED = "_use_default_values"


@torch.no_grad()
def convert_to(
    convention: PooledProjection,
    controlnet: SD3ControlNetModel,
    *,
    scaling_factor: float,
    shift_factor: float,
) -> None:
    """Convert a ControlNet to a convention, in place; nothing changes if it has it already.

    From `zeros` to `prompt` is exact: from its new inputs the ControlNet computes what it computed
    from the old ones. The pooled embedding's first layer gets zero weights, so that it has no say
    until training changes that. The shift goes into the bias of the conditioning's first layer,
    which has no padding: W x + b = W (x - c) + (b + c sum W).

    From `prompt` to `zeros` the shift is taken out of the bias as exactly, and what the pooled
    embedding told the ControlNet is lost.

    Args:
        convention: the new one.
        controlnet: its weights in float32.
        scaling_factor: of the VAE.
        shift_factor: of the VAE.
    """
    if pooled_projection_of(controlnet.config) == convention:
        return
    to_prompt = convention == "prompt"
    if to_prompt:
        controlnet.time_text_embed.text_embedder.linear_1.weight.zero_()
    first = controlnet.pos_embed_input.proj
    sums = first.weight.sum(dim=(1, 2, 3), dtype=torch.float64)
    change = shift_factor * scaling_factor * sums
    first.bias.copy_(first.bias.double() + (change if to_prompt else -change))
    set_pooled_projection(controlnet, convention)


def set_pooled_projection(controlnet: SD3ControlNetModel, convention: PooledProjection) -> None:
    """Have a ControlNet's configuration name a convention; its weights stay."""
    # diffusers resets what this names to its defaults when it builds a network from the entries.
    defaults = [name for name in controlnet.config.get(DEFAULTED, ()) if name != FORCE_ZEROS]
    controlnet.register_to_config(**{FORCE_ZEROS: convention == "zeros", DEFAULTED: defaults})
