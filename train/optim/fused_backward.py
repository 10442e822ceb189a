"""The optimiser's step within the backward pass: each gradient is used and freed at once.

At most one gradient exists at a time, which saves 4 bytes a trained parameter. Whatever needs all
gradients together becomes impossible: clipping their common norm, accumulating them, and
exchanging them between processes.
"""

from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from train.optim.nonfinite import skip_next_update
from train.optim.per_weight import only_weight


def check(*, num_processes: int, scales_loss: bool) -> None:
    """Refuse a launch that needs all gradients at once; `TrainConfig` refuses such settings.

    Args:
        num_processes: number of processes that train together.
        scales_loss: whether the loss is scaled, as for fp16.

    Raises:
        ConfigError: naming the option at fault.
    """
    rules = (
        (num_processes > 1, "several processes exchange theirs first"),
        (scales_loss, "--mixed-precision fp16 looks at all of them to find its scale; use bf16"),
    )
    reasons = [reason for broken, reason in rules if broken]
    if reasons:
        raise ConfigError(f"--fused-backward-pass: {'; '.join(reasons)}.")


class FusedBackward:
    """Steps an optimiser one weight at a time, as soon as the weight's gradient is known.

    Args:
        optimizer: torch's own or a compatible one, with one parameter group. Its state has the
            same form as without this class.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self._nonfinite: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._step)
            for parameter in self.group["params"]
        ]

    def pop_nonfinite(self) -> Tensor:
        """Return whether any gradient since the last call was not finite: 1 or 0, float32, [].

        Weights with such a gradient were not updated.
        """
        nonfinite, self._nonfinite = torch.stack(self._nonfinite).amax(), []
        return nonfinite

    def close(self) -> None:
        """Remove the hooks, whose reference cycle would keep the weights alive."""
        for hook in self._hooks:
            hook.remove()

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        nonfinite = (~torch.isfinite(parameter.grad).all()).float()
        self._nonfinite.append(nonfinite)
        with only_weight(self.group, parameter):
            skip_next_update(self.optimizer, nonfinite)
            self.optimizer.step()
        parameter.grad = None
