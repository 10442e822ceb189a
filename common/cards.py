"""Presets for graphics cards: `--card 8gb`, or `--card auto` for the fastest that fits.

A preset is a file of `configs/cards/`: a table of settings for each stage, and what they give up.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from common.config_file import GIVES_UP, read_section
from common.errors import ConfigError
from common.memory.need import GB, Need
from common.memory.processes import map_in_processes

Config = TypeVar("Config")
FOLDER = Path(__file__).parents[1] / "configs" / "cards"
AUTO = "auto"
# What a process takes of host memory beside what it offloads.
PROCESS_BYTES = 3_000_000_000


@dataclass(frozen=True)
class GivesUp:
    """What a preset's settings cost each stage; empty where nothing."""

    precompute: str = ""
    train: str = ""
    infer: str = ""
    score: str = ""
    serve: str = ""


@dataclass(frozen=True)
class Free:
    """A machine's free memory, in bytes.

    Attributes:
        device: of the graphics card.
        host: of the host.
        name: the card's name.
    """

    device: int
    host: int
    name: str


def card_names() -> list[str]:
    """Return the presets' names, that of the largest card first."""
    names = [path.stem for path in FOLDER.glob("*gb.toml")]
    return sorted(names, key=lambda name: -int(name.removesuffix("gb")))


def card_file(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ConfigError: there is none of this name.
    """
    names, name = card_names(), name.lower()
    if not names:
        raise ConfigError(
            f"--card {name}: {FOLDER} is not here; it comes with the repository, not with an "
            "installed package. Give --config with a copy of its file."
        )
    if name not in names:
        close = get_close_matches(name, [*names, AUTO], n=1)
        hint = (
            f"Did you mean {close[0]!r}?"
            if close
            else f"There are {', '.join(names[::-1])}, {AUTO}."
        )
        raise ConfigError(f"--card {name}: no such preset. {hint}")
    return FOLDER / f"{name}.toml"


def gives_up(name: str, section: str) -> str:
    """Return what a preset's settings cost a stage, or an empty string."""
    return str(read_section(card_file(name), GIVES_UP, GivesUp).get(section, ""))


def choose_card(
    configs: Mapping[str, Config | ConfigError],
    need: Callable[[Config, int], Need],
    free: Free,
    section: str,
) -> tuple[str, str]:
    """Return the name of the fastest preset that fits, and a line about it.

    Args:
        configs: a run's settings with each preset, the fastest first, or why they do not go with
            the preset.
        need: returns the memory that a run with these settings takes, where so much of the device
            is free.
        free: memory.
        section: the stage's name.

    Raises:
        ConfigError: none fits.
    """
    room = f"{free.device / GB:.1f} GB of {free.name} are free"
    tried = []

    def answer(config: Config | ConfigError) -> Need | ConfigError:
        try:
            return config if isinstance(config, ConfigError) else need(config, free.device)
        except ConfigError as error:
            return error

    answers = map_in_processes(answer, list(configs.values()))
    for name, needed in zip(configs, answers, strict=True):
        if isinstance(needed, ConfigError):
            tried.append(f"  {name}: {needed}")
            continue
        figures = f"needs {needed.free / GB:.1f} GB of it"
        if needed.host:
            figures += f" and {(needed.host + PROCESS_BYTES) / GB:.1f} of host memory"
        if needed.fits(free.device) and needed.host + PROCESS_BYTES <= free.host:
            cost = gives_up(name, section)
            chosen = f"{name}, {needed.chosen}" if needed.chosen else name
            return name, (
                f"--card auto: {room}; {chosen} {figures}" + (f"; gives up {cost}" if cost else "")
            )
        tried.append(f"  {name} {figures}")
    listing = "\n".join(tried)
    raise ConfigError(
        f"--card auto: {room}, and {free.host / GB:.1f} GB of host memory; no preset fits:\n"
        f"{listing}\nFree some memory, or name one to try it nevertheless: --card {name}."
    )


def free_memory_of(device: str | None) -> Free | None:
    """Return a machine's free memory, or None if it computes on no graphics card.

    Args:
        device: as `--device` has it; None for the best that is available.

    Raises:
        ConfigError: there are several processes, which would have to agree.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--card auto: is for one process; with several, name the preset, e.g. --card 24gb."
        )
    # Imported here, since importing torch takes seconds.
    import psutil
    import torch

    from common.device import free_gpu_bytes

    free = free_gpu_bytes(device)
    if free is None:
        return None
    name = torch.cuda.get_device_name(torch.device(device or "cuda"))
    return Free(free, psutil.virtual_memory().available, name)


def settings_with(name: str, section: str, config_class: type[Any]) -> dict[str, Any]:
    """Return the settings of a stage that a preset has.

    Raises:
        ConfigError: there is no such preset.
    """
    return read_section(card_file(name), section, config_class)
