"""What diffusers' train_controlnet_sd3.py trains with, which the configurations that it saves lack.

Conditioning pixels in [0, 1], 77 T5 tokens, the pooled embedding and the VAE's shift. Its
`config.json` says nothing of the first two, and of the others the opposite.
"""

from collections.abc import Mapping
from typing import Any, Literal

from sd3.controlnet.pooled_projection import FORCE_ZEROS
from sd3.pretrained import DATA_KEY

# Whether a ControlNet's configuration is taken at its word.
ConfigConvention = Literal["saved", "train_controlnet_sd3"]

SCRIPT_PIXEL_RANGE = "0_1"
SCRIPT_MAX_SEQUENCE_LENGTH = 77


def corrected(config: Mapping[str, Any], convention: ConfigConvention) -> dict[str, Any]:
    """Return a ControlNet's configuration, with what is missing if the script saved it."""
    if convention == "saved":
        return dict(config)
    data = dict(config.get(DATA_KEY) or {}) | {
        "conditioning_range": SCRIPT_PIXEL_RANGE,
        "max_sequence_length": SCRIPT_MAX_SEQUENCE_LENGTH,
    }
    return dict(config) | {FORCE_ZEROS: False, DATA_KEY: data}
