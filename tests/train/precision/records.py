"""What the networks of a run are given, and how fine the gradients are that reach the optimiser."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook


@dataclass
class Records:
    """What a process saw of its training; validations are left out.

    Attributes:
        timesteps: of each forward pass, by network.
        dtypes: of all floating arguments, by network and argument.
        finer: share of the gradients' numbers that bfloat16 cannot hold, of each step whose
            gradients are not all zero here.
    """

    timesteps: dict[str, list[Tensor]] = field(default_factory=dict)
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)
    finer: list[float] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Note what the two networks are given from now on."""
        for network in (SD3ControlNetModel, SD3Transformer2DModel):
            patch.setattr(network, "forward", self._noting(network.__name__, network.forward))

    def note_gradients(self, optimizer: Any, *_: Any) -> None:
        """Note how many numbers of an optimiser's gradients need more than bfloat16."""
        finer = total = 0
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                grad = grad.to_local() if isinstance(grad, DTensor) else grad
                grad = grad[grad != 0]
                finer += int((grad.float() != grad.bfloat16().float()).sum())
                total += grad.numel()
        if total:
            self.finer.append(finer / total)

    def _noting(self, name: str, forward: Any) -> Any:
        @functools.wraps(forward)
        def noting(module: Any, *args: Any, **inputs: Any) -> Any:
            if torch.is_grad_enabled():
                assert not args
                self.timesteps.setdefault(name, []).append(inputs["timestep"].clone())
                for argument, value in inputs.items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        self.dtypes.setdefault(f"{name} {argument}", set()).add(value.dtype)
            return forward(module, **inputs)

        return noting


@contextlib.contextmanager
def recorded() -> Iterator[Records]:
    """Record this process."""
    records = Records()
    hook = register_optimizer_step_pre_hook(records.note_gradients)
    with pytest.MonkeyPatch.context() as patch:
        records.watch(patch)
        try:
            yield records
        finally:
            hook.remove()


@contextlib.contextmanager
def recorded_to(path: Path) -> Iterator[None]:
    """Record this process, and save the records at the end."""
    with recorded() as records:
        try:
            yield
        finally:
            torch.save(vars(records), path)


def read(path: Path) -> Records:
    """Return the records that another process saved."""
    return Records(**torch.load(path, weights_only=True))
