"""A device's stream whose copies are done as late as they may be."""

from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor

from train.optim import host_memory


class LateCopies:
    """Stands in for `CopyStream`: copies are done in order, when one of them is waited for.

    What uses a target without waiting finds what was there before; what changes a source too early
    changes the copy.
    """

    count = 0

    def __init__(self, device: object) -> None:
        self._queue: list[tuple[int, Tensor, Tensor]] = []

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        LateCopies.count += 1
        for target, source in pairs:
            # Only their memory: autograd need not hear of it.
            self._queue.append((LateCopies.count, target.detach(), source.detach()))
        return LateCopies.count

    def wait(self, copied: Any) -> None:
        while copied and self._queue and self._queue[0][0] <= copied:
            _, target, source = self._queue.pop(0)
            target.copy_(source)

    def synchronize(self, copied: Any) -> None:
        self.wait(copied)


def make_copies_late(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    """Let modules that use `CopyStream` use late copies."""
    for module in (host_memory, *modules):
        monkeypatch.setattr(module, "CopyStream", LateCopies)
