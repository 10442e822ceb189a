"""An exponential moving average of the ControlNet's weights, often better than the weights."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.processes.sharding import reshard, sharded


class Ema:
    """The exponential moving average of a network's trained weights.

    After n updates its decay is `decay`, but at most (1 + n) / (10 + n), and 0 at the first, as
    in diffusers' EMAModel; so the initial weights do not dominate the first averages.

    Args:
        network: as training updates it.
        decay: of each update, between 0 and 1.
    """

    def __init__(self, network: Any, decay: float) -> None:
        self.network = network
        self.decay = decay
        self.num_steps = 0
        self.weights = [
            parameter.detach().to(torch.float32, copy=True) for parameter in self._parameters()
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Update the average with the network's current weights."""
        count = self.num_steps
        decay = min(self.decay, (1 + count) / (10 + count)) if count else 0.0
        update, parameters = get_ema_multi_avg_fn(decay), self._parameters()
        if all(parameter.dtype == torch.float32 for parameter in parameters):
            update(self.weights, parameters, self.num_steps)
        else:  # in float32 one at a time: all would take as much as the average itself
            for average, parameter in zip(self.weights, parameters, strict=True):
                update([average], [parameter.float()], self.num_steps)
        self.num_steps += 1

    def named_weights(self) -> dict[str, Tensor]:
        """Return the averages by the weights' names, in float32, sharded as the network is."""
        named = self.network.named_parameters()
        names = [name for name, parameter in named if parameter.requires_grad]
        return dict(zip(names, self.weights, strict=True))

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Temporarily load the averaged weights into the network."""
        reshard(self.network)
        parameters = self._parameters()
        trained = [parameter.clone() for parameter in parameters]
        _copy(parameters, self.weights)
        try:
            reshard(self.network)
            yield
        finally:
            _copy(parameters, trained)
            reshard(self.network)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue from a saved average.

        Args:
            weights: of the whole network, by name.
            num_steps: number of updates that it has averaged.
        """
        named = self.network.named_parameters()
        whole = [weights[name] for name, parameter in named if parameter.requires_grad]
        _copy(self.weights, map(sharded, whole, self.weights))
        self.num_steps = num_steps

    def _parameters(self) -> list[Tensor]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def _copy(targets: list[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
