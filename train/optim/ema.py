"""A moving average of the ControlNet's weights, often better than the weights themselves."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.distribution import forget_gathered, shared_out


class Ema:
    """The exponential moving average of a network's trained weights.

    After n updates its decay is `decay`, but at most (1 + n) / (10 + n), and 0 at the first, as
    in diffusers' EMAModel; so the first updates do not drag the beginning along.

    Args:
        network: as training updates it.
        decay: of each update, between 0 and 1.
    """

    def __init__(self, network: Any, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.num_steps = 0
        self.weights = [one.detach().to(torch.float32, copy=True) for one in self._trained()]

    @torch.no_grad()
    def step(self) -> None:
        """Take in the network's weights as they are now."""
        count = self.num_steps
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        update = get_ema_multi_avg_fn(decay)
        for average, parameter in zip(self.weights, self._trained(), strict=True):
            update([average], [parameter.float()], self.num_steps)
        self.num_steps += 1

    @contextlib.contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """Have the network bear the averaged weights meanwhile."""
        forget_gathered(self.network)
        trained = self._trained()
        own = [parameter.clone() for parameter in trained]
        _copy(trained, self.weights)
        try:
            forget_gathered(self.network)
            yield
        finally:
            _copy(trained, own)
            forget_gathered(self.network)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], num_steps: int) -> None:
        """Go on from an average that was saved.

        Args:
            weights: of the whole network, by name.
            num_steps: updates that were averaged.
        """
        names = [name for name, one in self.network.named_parameters() if one.requires_grad]
        whole = [weights[name] for name in names]
        _copy(self.weights, map(shared_out, whole, self.weights))
        self.num_steps = num_steps

    def _trained(self) -> list[Tensor]:
        return [one for one in self.network.parameters() if one.requires_grad]


def _copy(targets: list[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
