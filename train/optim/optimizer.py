"""The optimiser that a run's settings name, made of its library's class."""

import importlib
import importlib.util
from typing import Any

import torch

from common.errors import ConfigError
from train.config import TrainConfig
from train.optim.arguments import FLAG, check_arguments, parse_arguments
from train.optim.averaged_weights import AveragedWeights, averages
from train.optim.learning_rate import peak_learning_rate
from train.optim.named import ADAMS, NAMED, find_named
from train.optim.offloaded_state import OffloadedState
from train.optim.stochastic_rounding import StochasticRounding


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimiser that is not there, or that does not take its arguments.

    Raises:
        ConfigError: naming what is missing, or the argument.
    """
    _make(config, [torch.nn.Parameter(torch.zeros(1))], 1.0)


def make_optimizer(config: TrainConfig, parameters: list[Any], step_samples: int) -> Any:
    """Return the optimiser over some parameters; a step takes `step_samples` on all processes.

    Raises:
        ConfigError: it is not there, or does not take its arguments.
    """
    return _make(config, parameters, peak_learning_rate(config, step_samples))


def _make(config: TrainConfig, parameters: list[Any], learning_rate: float) -> Any:
    kind = find_class(config.optimizer)
    given = parse_arguments(config.optimizer_args)
    check_arguments(config.optimizer, kind, given)
    options = {**find_named(config.optimizer).options, **given}
    if config.optimizer in ADAMS:
        options |= {
            "betas": (config.adam_beta1, config.adam_beta2),
            "weight_decay": config.adam_weight_decay,
            "eps": config.adam_epsilon,
        }
    try:
        return extended(config, kind)(parameters, lr=learning_rate, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        shown = " ".join(f"{FLAG} {text}" for text in config.optimizer_args)
        raise ConfigError(
            f"--optimizer {config.optimizer} with {shown or f'no {FLAG}'} and a learning rate of "
            f"{learning_rate:g} cannot be made: {(str(error).splitlines() or ['no reason'])[0]}"
        ) from error


def extended(config: TrainConfig, kind: type[Any]) -> type[Any]:
    """Return a class of optimisers with what the settings add to it."""
    # Rounding wraps offloading: its temporaries come after the state has begun to leave.
    extensions: list[type[Any]] = []
    if config.bf16_weights:
        extensions.append(StochasticRounding)
    if config.offload_optimizer:
        extensions.append(OffloadedState)
    if averages(kind):
        extensions.append(AveragedWeights)
    if not extensions:
        return kind
    name = "".join(part.__name__ for part in (*extensions, kind))
    return type(name, (*extensions, kind), {})


def find_class(optimizer: str) -> type[Any]:
    """Return the class that `--optimizer` stands for.

    Raises:
        ConfigError: its package is not installed, or it is no optimiser.
    """
    where = f"--optimizer {optimizer}"
    named = find_named(optimizer)
    place, _, name = named.path.partition(":")
    package = place.partition(".")[0]
    if named.extra and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{where}: {package} is not installed: pip install '.[{named.extra}]'")
    try:
        module = importlib.import_module(place)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"{where}: {place} cannot be imported ({type(error).__name__}: {error}); it must lie "
            "in this folder or be installed."
        ) from error
    kind = getattr(module, name, None)
    if kind is None and optimizer not in NAMED:
        raise ConfigError(f"{where}: {place} has no {name}.")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ConfigError(f"{where}: {name} is no subclass of torch.optim.Optimizer.")
    return kind
