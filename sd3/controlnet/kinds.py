"""The two kinds of SD3's ControlNets, by what their blocks read.

`joint`: its blocks are the base's own, of picture and text, and it embeds the noised latents.
`stability`: as Stability's for SD3.5-large. Its blocks are of the picture alone, and it gets
latents that the base's positional embedding has turned into tokens.
"""

from collections.abc import Mapping
from typing import Any, Literal

ControlNetKind = Literal["joint", "stability"]

# What tells Stability's, in a ControlNet's configuration.
STABILITY = {"joint_attention_dim": None, "use_pos_embed": False}
# What a new one's configuration has instead of the base's entries.
PICTURE_ALONE: dict[str, Any] = STABILITY | {"dual_attention_layers": (), "qk_norm": None}


def kind_of(config: Mapping[str, Any]) -> ControlNetKind:
    """Return a ControlNet's kind.

    Args:
        config: its configuration. One that is of neither kind counts as `joint`.
    """
    is_stability = all(
        name in config and config[name] == value for name, value in STABILITY.items()
    )
    return "stability" if is_stability else "joint"
