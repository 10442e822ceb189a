"""What ComfyUI makes of a ControlNet's file, and a ControlNet changed so that it is driven rightly.

As of its release 0.3.64. It reads no configuration: all is told from names and shapes of weights. A
base of width W is taken to have W / 64 blocks. The ControlNet gets zeros for the pooled embedding,
and the control's latent scaled but not shifted; for inpainting, which has one more channel, too. A
residual goes to as many of the base's blocks in a row as the whole quotient of their numbers says;
see `sd3.controlnet.block_counts`. Stability's kind is read by other names of weights.

Axes: W width, C + E channels of control: those of a latent, and the mask of inpainting.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sd3.controlnet.block_counts import describe_count
from sd3.controlnet.kinds import kind_of
from sd3.controlnet.pooled_projection import pooled_projection_of
from sd3.inpainting import is_inpainting
from sd3.pretrained import DATA_KEY

HEAD_SIZE = 64
# Of SD3's VAE; ComfyUI knows no other.
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609
INPUT_WEIGHT, INPUT_BIAS = "pos_embed_input.proj.weight", "pos_embed_input.proj.bias"


def base_blocks(config: Mapping[str, Any]) -> int:
    """Return how many blocks ComfyUI takes a ControlNet's base to have."""
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"]) // HEAD_SIZE


def why_driven_wrongly(config: Mapping[str, Any], name_or_path: str) -> str | None:
    """Return why ComfyUI cannot drive a ControlNet as it was trained, and the way out; or None.

    Args:
        config: the ControlNet's configuration.
        name_or_path: of the ControlNet, as the user gave it.
    """
    if kind_of(config) == "stability":
        return (
            "it is of Stability's kind, whose weights ComfyUI reads by other names; load "
            "Stability's own files there"
        )
    if config.get("extra_conditioning_channels", 0) not in (0, 1):
        return "ComfyUI drives ControlNets with one channel beside the latent's at most"
    if int(config["attention_head_dim"]) != HEAD_SIZE:
        return (
            f"its attention heads are {config['attention_head_dim']} wide, and ComfyUI knows SD3's "
            f"{HEAD_SIZE} alone"
        )
    if not is_inpainting(config) and pooled_projection_of(config) == "prompt":
        return (
            "it was trained with the prompt's pooled embedding, and ComfyUI gives zeros; go on "
            "from it for some hundred steps with python -m train --pooled-projection zeros "
            f"--controlnet-model-name-or-path {name_or_path}"
        )
    pixel_range = (config.get(DATA_KEY) or {}).get("conditioning_range", "-1_1")
    if pixel_range != "-1_1":
        return f"its controls were {pixel_range} before the VAE, and ComfyUI's are in -1 to 1"
    counts = describe_count(int(config["num_layers"]), base_blocks(config))
    return f"{counts}; train one of such a number" if counts else None


@torch.no_grad()
def without_shift(weights: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return weights that compute from a control's latent without shift what these do with it.

    Only inpainting has the shift where the pooled embedding is zeros. The mask has none:
    W x - s k sum W, over the latent's channels of W [W, C + E, p, p], goes into the bias.

    Args:
        weights: by name, in float32.
        config: the ControlNet's configuration.
    """
    if not is_inpainting(config):
        return weights
    channels = int(config["in_channels"])
    of_latent = weights[INPUT_WEIGHT][:, :channels].sum(dim=(1, 2, 3), dtype=torch.float64)
    bias = weights[INPUT_BIAS].double() - SHIFT_FACTOR * SCALING_FACTOR * of_latent
    return weights | {INPUT_BIAS: bias.to(weights[INPUT_BIAS].dtype)}
