"""The two conventions of a ControlNet's inputs beside noise, timestep and prompt.

`prompt`: the ControlNet gets the prompt's pooled embedding, and its conditioning latents are
shifted and scaled as the VAE says. `zeros`: it gets zeros for the pooled embedding, and its
conditioning latents are scaled alone. InstantX's ControlNets were trained so, and ComfyUI drives
all of them so. Either way the base gets the prompt's pooled embedding. The stock pipeline takes the
convention from the entry `force_zeros_for_pooled_projection` of a ControlNet's configuration; where
it is missing, diffusers' default is `zeros`.
"""

from collections.abc import Mapping
from typing import Any, Literal

PooledProjection = Literal["prompt", "zeros"]

FORCE_ZEROS = "force_zeros_for_pooled_projection"
# Of a ControlNet that is grown anew.
DEFAULT_POOLED_PROJECTION: PooledProjection = "prompt"


def pooled_projection_of(config: Mapping[str, Any]) -> PooledProjection:
    """Return the convention in which the stock pipeline drives a ControlNet.

    Args:
        config: the ControlNet's configuration.
    """
    return "zeros" if config.get(FORCE_ZEROS, True) else "prompt"
