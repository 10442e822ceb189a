"""AdamW, its learning rate, and where its numbers are kept."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor

from train.config import TrainConfig

# Smaller ones are not worth a trip.
VISITING_NUMBERS = 4096
PIECE_BYTES, ALIGNMENT_NUMBERS = 1 << 28, 64


def peak_learning_rate(config: TrainConfig, step_samples: int) -> float:
    """Return the learning rate, scaled by the samples an optimiser step where that is asked for."""
    return config.learning_rate * (step_samples if config.scale_lr else 1)


def make_optimizer(config: TrainConfig, parameters: list[Any], step_samples: int) -> Any:
    """Return AdamW over the ControlNet's trainable parameters."""
    kind: Any = torch.optim.AdamW
    more: dict[str, Any] = {"fused": True}
    if config.use_8bit_adam:
        import bitsandbytes

        kind, more = bitsandbytes.optim.AdamW8bit, {}
    if config.offload_optimizer or config.bf16_weights:
        kind = type(f"WeightByWeight{kind.__name__}", (WeightByWeight, kind), {})
        more["offload"] = config.offload_optimizer
    return kind(
        parameters,
        lr=peak_learning_rate(config, step_samples),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        **more,
    )


def make_schedule(config: TrainConfig, optimizer: Any, num_steps: int) -> Any:
    """Return diffusers' learning rate schedule."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def set_learning_rate(schedule: Any, learning_rate: float) -> None:
    """Have a schedule that was restored from a checkpoint go on with the rate now asked for."""
    schedule.base_lrs = [learning_rate] * len(schedule.base_lrs)
    for group, shape in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = learning_rate
        group["lr"] = learning_rate * shape(schedule.last_epoch)


@contextlib.contextmanager
def alone(group: dict[str, Any], parameter: Any) -> Iterator[None]:
    """Have an optimiser's group hold one weight alone meanwhile."""
    everything = group["params"]
    group["params"] = [parameter]
    try:
        yield
    finally:
        group["params"] = everything


class WeightByWeight(torch.optim.Optimizer):
    """Stands before an optimiser's class, of one group, and has it step one weight at a time.

    So its state can stay in host memory and visit the device for its weight's step alone, to the
    same bits; and a weight kept in bfloat16 is exact for its step, and then rounded up or down at
    random, in proportion to how near each is: rounded to the nearest, small updates would vanish
    (Gupta et al. 2015, arXiv:1502.02551).

    Args:
        parameters: to be trained.
        offload: whether the state stays in host memory.
        more: the optimiser's own.
    """

    def __init__(self, parameters: list[Any], *, offload: bool, **more: Any) -> None:
        super().__init__(parameters, **more)
        self.offload = offload
        self._pieces: dict[torch.dtype, tuple[Tensor, int]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                with alone(group, parameter), exact(parameter), self._visiting(state):
                    super().step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; state goes where it is kept, in the precision that it was in.

        The optimiser's own way would cast it to its weight's precision, and would have all of it
        on the device for a moment.
        """
        super().load_state_dict(state_dict | {"state": {}})
        saved = state_dict["state"]
        for number, parameter in enumerate(self.param_groups[0]["params"]):
            state = self.state[parameter]
            for name, value in _unpacked(saved.get(number, {})).items():
                if not isinstance(value, Tensor):
                    state[name] = value
                elif self.offload and _travels(value):
                    state[name] = self._home(value, parameter.device).copy_(value)
                else:
                    state[name] = value.to(parameter.device, copy=True)

    @contextlib.contextmanager
    def _visiting(self, state: dict[str, Any]) -> Iterator[None]:
        """Have a weight's state on the weight's device meanwhile."""
        if not self.offload:
            yield
            return
        (parameter,) = self.param_groups[0]["params"]
        homes = {name: tensor for name, tensor in state.items() if _travels(tensor)}
        for name, tensor in homes.items():
            state[name] = tensor.to(parameter.device, non_blocking=True)
        yield
        # Nobody waits: later visits and readers of a step's results come after these copies.
        for name, tensor in state.items():
            if _travels(tensor):
                home = homes[name] if name in homes else self._home(tensor, tensor.device)
                state[name] = home.copy_(tensor, non_blocking=True)

    def _home(self, like: Tensor, device: torch.device) -> Tensor:
        """Return host memory for a tensor, pinned where a GPU is to reach it.

        Pinned memory comes in powers of two; so it is taken in large pieces and given out in parts,
        of one number format each, as torch.save wants it.
        """
        piece, start = self._pieces.get(like.dtype, (torch.empty(0, dtype=like.dtype), 0))
        count = like.numel()
        if start + count > len(piece):
            size = max(PIECE_BYTES // like.element_size(), count)
            pinned = device.type == "cuda"
            piece, start = torch.empty(size, dtype=like.dtype, pin_memory=pinned), 0
        end = start + -(-count // ALIGNMENT_NUMBERS) * ALIGNMENT_NUMBERS
        self._pieces[like.dtype] = piece, end
        return piece[start : start + count].view(like.shape)


def _travels(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.numel() >= VISITING_NUMBERS


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """Return a weight's saved state; bitsandbytes has part of its own in a dictionary within."""
    found: dict[str, Any] = {}
    for name, value in state.items():
        found |= value if isinstance(value, dict) else {name: value}
    return found


@contextlib.contextmanager
def exact(parameter: Any) -> Iterator[None]:
    """Have a bfloat16 weight and its gradient in float32 meanwhile."""
    if parameter.dtype != torch.bfloat16:
        yield
        return
    kept, gradient = parameter.data, parameter.grad
    parameter.grad = None
    parameter.data = kept.float()
    parameter.grad = gradient.float()
    yield
    exact = parameter.data
    parameter.grad = None
    parameter.data = kept.copy_(rounded_at_random(exact))
    parameter.grad = gradient


def rounded_at_random(exact: Tensor) -> Tensor:
    """Return float32 as bfloat16, up or down with the chances that keep its mean.

    Numbers that are not finite stay so.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    # The cut-off 16 bits carry over into the kept ones as often as they are large.
    moved = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(exact.isfinite(), moved, exact).to(torch.bfloat16)
