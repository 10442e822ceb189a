"""An optimiser's state in host memory."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.optim.host_memory import HostMemory
from train.optim.per_weight import UncastState, only_weight

MIN_OFFLOADED_NUMBERS = 4096  # smaller tensors stay on the device


def is_offloaded(count: int) -> bool:
    """Return whether state of `count` numbers goes to host memory."""
    return count >= MIN_OFFLOADED_NUMBERS


class OffloadedState(UncastState):
    """Keeps an optimiser's state in host memory, and computes the same numbers.

    It goes before an optimiser's class, with one parameter group, and steps one weight at a time;
    only that weight's state is on the device.

    Args:
        parameters: to be trained.
        options: the optimiser's own.
    """

    def __init__(self, parameters: list[Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._memory = HostMemory()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                with only_weight(group, parameter), self._state_on_device(parameter):
                    super().step()

    def placed(self, saved: Tensor, device: torch.device) -> Tensor:
        """Return a copy of saved state, in host memory unless it is small."""
        if not is_offloaded(saved.numel()):
            return super().placed(saved, device)
        # Never on the device, not even for a moment: there may be no room for it.
        return self._memory.empty_like(saved, device).copy_(saved)

    @contextlib.contextmanager
    def _state_on_device(self, parameter: Tensor) -> Iterator[None]:
        """Temporarily move a weight's state to the weight's device."""
        state = self.state[parameter]
        on_host = _large_tensors(state)
        for name, tensor in on_host.items():
            state[name] = tensor.to(parameter.device, non_blocking=True)
        yield
        # No need to wait: whatever uses the copies is queued on the device after them.
        for name, tensor in _large_tensors(state).items():
            host = (
                on_host[name] if name in on_host else self._memory.empty_like(tensor, tensor.device)
            )
            state[name] = host.copy_(tensor, non_blocking=True)


def _large_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and is_offloaded(value.numel())
    }
