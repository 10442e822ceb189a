"""The optimisers that have a name, and where each comes from; nothing is imported for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# --use-8bit-adam is another way to say --optimizer with this name.
ADAMW, ADAMW_8BIT, SCHEDULE_FREE = "adamw", "adamw8bit", "schedulefree"
# Whose betas, epsilon and weight decay are the --adam-… options.
ADAMS = (ADAMW, ADAMW_8BIT)


@dataclass(frozen=True)
class Named:
    """An optimiser that has a name.

    Attributes:
        path: its `package.module:Class`.
        extra: what to install for it, if it comes with none of our dependencies.
        options: that a run gives it, unless --optimizer-args says otherwise.
        by_weight: whether it steps a weight by that weight's gradient and state alone. Then the
            weights may be stepped one after the other, each when its turn comes.
    """

    path: str
    extra: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    by_weight: bool = True


NAMED: dict[str, Named] = {
    ADAMW: Named("torch.optim:AdamW", options={"fused": True}),
    ADAMW_8BIT: Named("bitsandbytes.optim:AdamW8bit", "bitsandbytes"),
    # bitsandbytes' needs no further package, and has kernels for both CPU and GPU.
    "lion": Named("bitsandbytes.optim:Lion", "bitsandbytes"),
    # With these its rate is --learning-rate. Else it is multiplied by the size of each weight,
    # which is 0 for the zero convolutions of a new ControlNet.
    "adafactor": Named(
        "transformers.optimization:Adafactor",
        options={"relative_step": False, "scale_parameter": False},
    ),
    "prodigy": Named("prodigyopt:Prodigy", "prodigy", by_weight=False),
    # Weight by weight: all at once would take as much memory again as the weights.
    SCHEDULE_FREE: Named(
        "schedulefree:AdamWScheduleFree",
        "schedulefree",
        options={"foreach": False},
        by_weight=False,
    ),
}


def find_named(optimizer: str) -> Named:
    """Return what `--optimizer` stands for: a name, or the user's own `package.module:Class`."""
    return NAMED.get(optimizer) or Named(optimizer, by_weight=False)


def is_known(optimizer: str) -> bool:
    """Return whether this is a name, or has the form of `package.module:Class`."""
    module, _, name = optimizer.partition(":")
    return optimizer in NAMED or (
        name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    )
