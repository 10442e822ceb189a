"""An optimiser's state in host memory."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.optim.host_memory import CopyStream, HostMemory
from train.optim.per_weight import UncastState, only_weight

MIN_OFFLOADED_NUMBERS = 4096  # smaller tensors stay on the device


def is_offloaded(count: int) -> bool:
    """Return whether state of `count` numbers goes to host memory."""
    return count >= MIN_OFFLOADED_NUMBERS


class OffloadedState(UncastState):
    """Keeps an optimiser's state in host memory, and computes the same numbers.

    It goes before an optimiser's class, with one parameter group, and steps one weight at a time,
    all in one call or each in its own. While a weight steps, the state of the next one comes to the
    device and that of the one before leaves it, each on a stream of its own; no other state is
    there. Which weight is the next is known from the step before: the first one waits, as does
    any that comes at another place than then.

    Args:
        parameters: to be trained.
        options: the optimiser's own.
    """

    def __init__(self, parameters: list[Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self._memory = HostMemory()
        self._streams: tuple[CopyStream, CopyStream] | None = None  # to the device, to the host
        self._next: dict[Tensor | None, Tensor] = {}  # by weight; None: before the first
        self._stepped: set[Tensor] = set()  # within this optimiser step
        self._last: Tensor | None = None
        self._arriving: dict[Tensor, tuple[dict[str, Tensor], Any]] = {}
        self._leaving: tuple[list[tuple[Tensor, Tensor]], Any] = [], None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._note(parameter)
                with only_weight(group, parameter), self._state_on_device(parameter):
                    super().step()

    def state_dict(self) -> dict[str, Any]:
        """Return groups and state, all of which has arrived on the host."""
        if self._streams is not None:
            self._streams[1].synchronize(self._leaving[1])
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state; state that was fetched ahead is the old one."""
        self._settle()
        super().load_state_dict(state_dict)

    def placed(self, saved: Tensor, device: torch.device) -> Tensor:
        """Return a copy of saved state, in host memory unless it is small."""
        if not is_offloaded(saved.numel()):
            return super().placed(saved, device)
        # Never on the device, not even for a moment: there may be no room for it.
        return self._memory.empty_like(saved, device).copy_(saved)

    def _note(self, parameter: Tensor) -> None:
        """Learn the order of the weights."""
        if parameter in self._stepped:
            self._settle()  # else this weight's state could still be leaving
            self._next.pop(self._last, None)
            self._stepped, self._last = set(), None
        self._next[self._last] = parameter
        self._stepped.add(parameter)
        self._last = parameter

    @contextlib.contextmanager
    def _state_on_device(self, parameter: Tensor) -> Iterator[None]:
        """Temporarily move a weight's state to the weight's device, and the next one's after it."""
        if self._streams is None:
            self._streams = CopyStream(parameter.device), CopyStream(parameter.device)
        arrivals, departures = self._streams
        state, following = self.state[parameter], self._next.get(parameter)
        on_host = _large_tensors(state)
        self._fetch(parameter)
        tensors, copied = self._arriving.pop(parameter)
        arrivals.wait(copied)
        state.update(tensors)
        if following in self._stepped:
            following = None  # another order than before: it would come in vain
        if following is not None:
            self._fetch(following)
        yield
        pairs = []
        for name, tensor in _large_tensors(state).items():
            host = on_host.get(name)
            if host is None:
                host = self._memory.empty_like(tensor, tensor.device)
            pairs.append((host, tensor))
            state[name] = host
        left, self._leaving = self._leaving, (pairs, departures.copy(pairs))
        departures.wait(left[1])  # the device's memory may be used anew only then
        if following is None:
            self._settle()

    def _settle(self) -> None:
        """Let the device wait for all copies, and forget what came in vain."""
        if self._streams is None:
            return
        arrivals, departures = self._streams
        for _, copied in self._arriving.values():
            arrivals.wait(copied)  # its memory may be used anew only then
        self._arriving.clear()
        departures.wait(self._leaving[1])
        self._leaving = [], self._leaving[1]  # the host may still have to wait for it

    def _fetch(self, parameter: Tensor) -> None:
        """Let a weight's state come to the device, unless it does already."""
        assert self._streams is not None
        if parameter not in self._arriving:
            on_host = _large_tensors(self.state[parameter])
            device = parameter.device
            tensors = {name: torch.empty_like(one, device=device) for name, one in on_host.items()}
            pairs = [(tensors[name], host) for name, host in on_host.items()]
            self._arriving[parameter] = tensors, self._streams[0].copy(pairs)


def _large_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and is_offloaded(value.numel())
    }
