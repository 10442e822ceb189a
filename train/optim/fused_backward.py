"""The optimiser's step within the backward pass: each gradient is used and freed as it comes.

No gradient but one is ever kept, which saves 4 bytes a trained parameter. What needs all gradients
at once is then impossible: clipping their common norm, accumulating, sharing them out.
"""

from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from train.config import TrainConfig
from train.optim.adamw import alone
from train.optim.nonfinite import hold_back


def check(config: TrainConfig, *, num_processes: int, scales: bool) -> None:
    """Refuse settings that need all gradients at once.

    Args:
        config: of the run.
        num_processes: that train together.
        scales: whether the loss is scaled, as for fp16.

    Raises:
        ConfigError: naming the option at fault.
    """
    wrong = [
        reason
        for applies, reason in (
            (
                config.max_grad_norm > 0,
                f"--max-grad-norm {config.max_grad_norm:g} clips the norm of all gradients "
                "together; --max-grad-norm 0 leaves that out",
            ),
            (
                config.gradient_accumulation_steps > 1,
                "--gradient-accumulation-steps keeps gradients from batch to batch",
            ),
            (num_processes > 1, "several processes exchange theirs first"),
            (scales, "--mixed-precision fp16 looks at all of them to find its scale; use bf16"),
        )
        if applies
    ]
    if wrong:
        raise ConfigError(f"--fused-backward-pass: {'; '.join(wrong)}.")


class FusedBackward:
    """Steps an optimiser, weight by weight, as gradients come.

    Args:
        optimizer: torch's own or one like it, of one group; its state is as ever.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        (self.group,) = optimizer.param_groups
        self._bad: list[Tensor] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._step)
            for parameter in self.group["params"]
        ]

    def bad(self) -> Tensor:
        """Return whether any gradient since the last call was not finite: 1 or 0, float32, [].

        Those weights were left as they are.
        """
        found, self._bad = torch.stack(self._bad).amax(), []
        return found

    def close(self) -> None:
        """Let go of the weights, which would otherwise hold on to themselves by their hooks."""
        for hook in self._hooks:
            hook.remove()

    def _step(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        bad = (~torch.isfinite(parameter.grad).all()).float()
        self._bad.append(bad)
        with alone(self.group, parameter):
            hold_back(self.optimizer, bad)
            self.optimizer.step()
        parameter.grad = None
