"""How much memory an optimiser's state takes.

Of those that have a name by arithmetic; of another by a step of its own with tensors that have no
numbers.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from common.errors import ConfigError
from train.config import TrainConfig
from train.optim.arguments import parse_arguments
from train.optim.named import NAMED
from train.optim.optimizer import find_class, make_optimizer

# bitsandbytes keeps the moments of smaller weights in float32, and larger ones with a float32
# scale for each block.
MIN_8BIT_NUMBERS, NUMBERS_PER_8BIT_BLOCK = 4096, 256


def state_bytes(config: TrainConfig, shape: torch.Size) -> int:
    """Return the size of an optimiser's state for a weight, in bytes.

    Raises:
        ConfigError: that of the user's own class is not known.
    """
    given, count = parse_arguments(config.optimizer_args), math.prod(shape)
    match config.optimizer:
        case "adamw":
            return (12 if given.get("amsgrad") else 8) * count
        case "adamw8bit":
            return 2 * _moment(count, 8, given)
        case "lion":
            return _moment(count, given.get("optim_bits", 32), given)
        case "adafactor":
            first = 0 if given.get("beta1") is None else 4 * count
            return first + 4 * (_rows_and_columns(shape) if len(shape) > 1 else count)
        case "prodigy":
            # The distance from where the weights began counts every `slice_p`-th of them.
            moments = 1 if given.get("betas", (0.9,))[0] == 0 else 2
            every: int = given.get("slice_p", 1)
            return 4 * (moments * count + 2 * -(-count // every))
        case "schedulefree":
            return 8 * count
    return _simulated(config, tuple(shape))


def _moment(count: int, bits: int, given: dict[str, Any]) -> int:
    least: int = given.get("min_8bit_size", MIN_8BIT_NUMBERS)
    if bits == 32 or count < least:
        return 4 * count
    return count + 4 * -(-count // NUMBERS_PER_8BIT_BLOCK)


def _rows_and_columns(shape: torch.Size) -> int:
    """Return how many numbers Adafactor keeps of the last two dimensions' squares."""
    *others, rows, columns = shape
    return math.prod(others) * (rows + columns)


@cache
def _simulated(config: TrainConfig, shape: tuple[int, ...]) -> int:
    """Return the size of the state after one step of a weight without numbers."""
    assert config.optimizer not in NAMED
    find_class(config.optimizer)
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(shape))
        parameter.grad = torch.empty(shape)
        optimizer = make_optimizer(config, [parameter], 1)
        try:
            optimizer.step()
        except Exception as error:  # whatever the user's own code raises
            raise ConfigError(
                f"--optimizer {config.optimizer}: how much memory its state takes is not known, "
                "since its step needs numbers "
                f"({type(error).__name__}). Estimate with --optimizer adamw, whose state takes 8 "
                "bytes a weight."
            ) from error
    tensors = [one for one in optimizer.state[parameter].values() if isinstance(one, Tensor)]
    return sum(one.nbytes for one in tensors if one.ndim)
