"""A stand-in for a device with memory of its own, on machines where there is only the host."""

from typing import Any

import pytest
from torch import Tensor


def copy_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `Tensor.to` return a copy, as on the way to a GPU.

    From CPU to CPU it returns the same tensor, so what is not copied back would go unseen.
    """
    to = Tensor.to

    def copied(self: Tensor, *args: Any, **more: Any) -> Tensor:
        moved = to(self, *args, **more)
        return moved.clone() if moved is self else moved

    monkeypatch.setattr(Tensor, "to", copied)
