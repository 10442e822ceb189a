"""Optimisers that train at one point and average others: schedulefree's.

Their `eval()` puts the average into the network, for whoever validates or saves it, and their
`train()` the point at which the next gradient is taken.
Source: Defazio et al. 2024, arXiv:2405.15682.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TRAINED = "trained"  # name of the weights as they are trained, in the state while they are away


def averages(kind: type[Any]) -> bool:
    """Return whether a class of optimisers has an average beside the weights that it trains."""
    return callable(getattr(kind, "train", None)) and callable(getattr(kind, "eval", None))


def averaged(optimizer: Any) -> AbstractContextManager[None]:
    """Temporarily put an optimiser's average into the network; nothing is done if it has none."""
    return optimizer.averaged() if isinstance(optimizer, AveragedWeights) else nullcontext()


class AveragedWeights(torch.optim.Optimizer):
    """Goes before the class of an optimiser with `train()` and `eval()`, and keeps the weights.

    That class computes the trained weights from the average and back, each time rounded a little
    differently. Here they are kept beside it meanwhile, and so in each checkpoint: neither
    validating nor resuming changes a bit of what follows. It takes 4 bytes a weight.

    Args:
        parameters: to be trained.
        options: the optimiser's own.
    """

    train: Callable[[], None]
    eval: Callable[[], None]

    def __init__(self, parameters: list[Any], **options: Any) -> None:
        super().__init__(parameters, **options)
        self.train()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient; if none has, the step is one that is left out."""
        if any(parameter.grad is not None for parameter in self._parameters()):
            super().step(closure)

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Temporarily put the average into the network."""
        parameters = self._parameters()
        for parameter in parameters:
            self.state[parameter][TRAINED] = parameter.detach().clone()
        self.eval()
        try:
            yield
        finally:
            self.train()
            self._put_back()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and state, and the weights as they are trained."""
        super().load_state_dict(state_dict)
        self.train()
        self._put_back()

    @torch.no_grad()
    def _put_back(self) -> None:
        for parameter in self._parameters():
            trained = self.state[parameter].pop(TRAINED, None)
            if trained is not None:
                parameter.copy_(trained)

    def _parameters(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"]]
