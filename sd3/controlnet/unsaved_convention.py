"""What ControlNets of others were trained with, where their configurations do not say it.

`train_controlnet_sd3`: diffusers' script trains with conditioning pixels in [0, 1], 77 T5 tokens,
the pooled embedding and the VAE's shift. Its `config.json` says nothing of the first two, and the
opposite of the others.

`stability_canny`: conditioning pixels x of Stability's Canny ControlNet for SD3.5-large, in [0, 1],
become 255 * 0.5 * x + 0.5 before the VAE, as in Stability's sd3.5 and its model card.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sd3.controlnet.pooled_projection import FORCE_ZEROS
from sd3.pretrained import DATA_KEY

# Whether a ControlNet's configuration is taken at its word.
ConfigConvention = Literal["saved", "train_controlnet_sd3", "stability_canny"]

SCRIPT_PIXEL_RANGE = "0_1"
SCRIPT_MAX_SEQUENCE_LENGTH = 77


def corrected(config: Mapping[str, Any], convention: ConfigConvention) -> dict[str, Any]:
    """Return a ControlNet's configuration, with what is missing in it by a convention."""
    if convention == "saved":
        return dict(config)
    data = dict(config.get(DATA_KEY) or {})
    if convention == "stability_canny":
        return dict(config) | {DATA_KEY: data | {"conditioning_range": convention}}
    data |= {
        "conditioning_range": SCRIPT_PIXEL_RANGE,
        "max_sequence_length": SCRIPT_MAX_SEQUENCE_LENGTH,
    }
    return dict(config) | {FORCE_ZEROS: False, DATA_KEY: data}
