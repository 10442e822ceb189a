"""Counting the bytes of all living tensors, real or fake."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While entered, counts the bytes of all tensors that are created and freed.

    Attributes:
        now: bytes of living tensors, by kind.
        peak: the value of `now` when its sum was largest.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._kinds: dict[int, tuple[str, int]] = {}

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor under a kind from now on; views of one storage count once."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        counted = self._kinds.get(number)
        if counted is None:
            weakref.finalize(storage, self._forget, number)
        else:
            self.now[counted[0]] -= counted[1]
        size = storage.nbytes()
        self._kinds[number] = kind, size
        self.now[kind] = self.now.get(kind, 0) + size
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def kind(self, tensor: Tensor) -> str | None:
        """Return the kind that a tensor counts under; None if it is not counted."""
        return self._kinds.get(tensor.untyped_storage()._cdata, (None, 0))[0]

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator and count the new tensors that it returns."""
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # a fake tensor's; asked as often as all else together
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self.kind(tensor) is None:
                self.count(tensor, "activations")
        return result

    def _forget(self, number: int) -> None:
        kind, size = self._kinds.pop(number)
        self.now[kind] -= size
