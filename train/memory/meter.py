"""How many bytes tensors take, moment by moment, whether they are real or fake."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """While this is entered, counts the bytes of all tensors that come and go.

    Attributes:
        now: bytes alive, by kind.
        peak: the same at the moment when they were most in all.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: dict[str, int] = {}
        self.peak: dict[str, int] = {}
        self._kinds: dict[int, tuple[str, int]] = {}

    def count(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor as of a kind from now on; views share their bytes."""
        storage = tensor.untyped_storage()
        number = storage._cdata
        known = self._kinds.get(number)
        if known is None:
            weakref.finalize(storage, self._forget, number)
        else:
            self.now[known[0]] -= known[1]
        size = storage.nbytes()
        self._kinds[number] = kind, size
        self.now[kind] = self.now.get(kind, 0) + size
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)

    def kind(self, tensor: Tensor) -> str | None:
        """Return what a tensor counts as; None if it was not seen."""
        return self._kinds.get(tensor.untyped_storage()._cdata, (None, 0))[0]

    def start_anew(self) -> None:
        """Forget the peak so far."""
        self.peak = dict(self.now)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operator and count what it returns."""
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and self.kind(tensor) is None:
                self.count(tensor, "activations")
        return found

    def _forget(self, number: int) -> None:
        kind, size = self._kinds.pop(number)
        self.now[kind] -= size
