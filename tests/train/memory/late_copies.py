"""A device's stream whose copies are done as late, and read host memory as early, as may be."""

from collections.abc import Iterable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from train.optim import host_memory
from train.optim.host_memory import HostMemory


class LateCopies:
    """Stands in for `CopyStream`: copies are done in order, when one of them is waited for.

    What uses a target without waiting finds what was there before; what changes a source too early
    changes the copy. A copy from a `HostMemory` reads it at once, though, and the host sees what
    was copied there only once it has synchronised: `wait` is for the device.
    """

    count = 0
    host: ClassVar[dict[int, Tensor]] = {}  # what is of a HostMemory, by address
    seen_by_device: ClassVar[dict[int, Tensor]] = {}  # the same, where the device has written to it

    def __init__(self, device: object) -> None:
        self._queue: list[tuple[int, Tensor, Tensor]] = []

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        LateCopies.count += 1
        for target, source in pairs:
            # Only their memory: autograd need not hear of it.
            target, source = target.detach(), source.detach()
            if source.data_ptr() in self.host:
                source = self.seen_by_device.get(source.data_ptr(), source).clone()
            if target.data_ptr() in self.host:
                target = self.seen_by_device.setdefault(target.data_ptr(), target.clone())
            self._queue.append((LateCopies.count, target, source))
        return LateCopies.count

    def wait(self, copied: Any) -> None:
        while copied and self._queue and self._queue[0][0] <= copied:
            _, target, source = self._queue.pop(0)
            target.copy_(source)

    def synchronize(self, copied: Any) -> None:
        if copied:
            self.wait(copied)
            for address, seen in self.seen_by_device.items():
                self.host[address].copy_(seen)


def make_copies_late(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Let modules that use `CopyStream` use late copies."""
    empty_like = HostMemory.empty_like

    def noted(self: HostMemory, tensor: Tensor, device: torch.device) -> Tensor:
        host = empty_like(self, tensor, device)
        return LateCopies.host.setdefault(host.data_ptr(), host)

    monkeypatch.setattr(HostMemory, "empty_like", noted)
    for name in ("host", "seen_by_device"):
        monkeypatch.setattr(LateCopies, name, {})
    for module in (host_memory, *modules):
        monkeypatch.setattr(module, "CopyStream", LateCopies)
