"""Optimisers that step one weight at a time, and state that is restored weight by weight."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def only_weight(group: dict[str, Any], parameter: Any) -> Iterator[None]:
    """Temporarily reduce an optimiser's parameter group to a single weight."""
    parameters = group["params"]
    group["params"] = [parameter]
    try:
        yield
    finally:
        group["params"] = parameters


class UncastState(torch.optim.Optimizer):
    """Restores an optimiser's state in the precision it was saved in.

    The optimiser's own `load_state_dict` would cast it to the precision of the weights. This class
    goes before an optimiser's class; it supports a single parameter group.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state from what `state_dict` returned."""
        super().load_state_dict(state_dict | {"state": {}})
        saved = state_dict["state"]
        (group,) = self.param_groups
        for number, parameter in enumerate(group["params"]):
            state = self.state[parameter]
            for name, value in flat_state(saved.get(number, {})).items():
                is_tensor = isinstance(value, Tensor)
                state[name] = self.placed(value, parameter.device) if is_tensor else value

    def placed(self, saved: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a weight's saved state where it is kept; `device` is the weight's."""
        return saved.to(device, copy=True)


def flat_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a weight's saved state without the inner dictionary that bitsandbytes saves."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat
