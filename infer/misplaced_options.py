"""Options that a command of `python -m infer` does not have, and where each belongs."""

from dataclasses import fields
from typing import Any

from common.config_file import aliases, switches
from common.options import flag
from infer.config import DecodeConfig, ExportConfig, GenerateConfig, ScoreConfig, ServeConfig
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

# Of an option that several have, the first is named.
COMMANDS = {
    "train": TrainConfig,
    "precompute": PrecomputeConfig,
    "infer generate": GenerateConfig,
    "infer score": ScoreConfig,
    "infer serve": ServeConfig,
    "infer decode": DecodeConfig,
    "infer export": ExportConfig,
}


def misplaced(config_class: type[Any]) -> dict[str, str]:
    """Return the other commands' options, as flags, and which command each belongs to.

    Args:
        config_class: of the command; its own options are left out.
    """
    own = _flags(config_class)
    found: dict[str, str] = {}
    for command, other in COMMANDS.items():
        for name in _flags(other) - own:
            found.setdefault(name, f"belongs to python -m {command}.")
    return found


def _flags(config_class: type[Any]) -> set[str]:
    names = [field.name for field in fields(config_class)]
    return {flag(name) for name in (*names, *aliases(config_class), *switches(config_class))}
