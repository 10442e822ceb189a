"""An annotator's arguments: `key=value` as TOML values, checked against what the code takes."""

import datetime
import inspect
import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import ConfigError
from common.options import split_arguments

FLAG = "--conditioning-args"
# What a run gives an annotator itself; it changes no drawing.
FROM_THE_RUN = ("device",)
PLAIN = (bool, int, float, str)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of `key=value` texts; a value that is no TOML is taken as text.

    Raises:
        ConfigError: a text has no key or no `=`, or a key comes twice.
    """
    split = split_arguments(FLAG, texts, "radius=4")
    return {key: _value(text, value) for text, key, value in split}


def _value(text: str, value: str) -> Any:
    try:
        document = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return value
    parsed = document["value"]
    if len(document) > 1 or isinstance(parsed, datetime.date | datetime.time):
        return value
    if isinstance(parsed, float) and not math.isfinite(parsed):
        raise ConfigError(f"{FLAG} {text}: expected a finite number.")
    return parsed


def bind_arguments(
    name: str,
    code: Callable[..., Any],
    given: Mapping[str, Any],
    num_images: int = 1,
    *,
    takes_rest: bool = True,
) -> dict[str, Any]:
    """Return the arguments that code is called with: those given, and the others' defaults.

    Args:
        name: of the annotator, for errors.
        code: a function, or a class.
        given: values by name.
        num_images: how many of the first parameters are images; 0 for a class.
        takes_rest: whether `**kwargs` take arguments of any name.

    Raises:
        ConfigError: one is unknown, is missing, or is of another type than its default.
    """
    parameters = _parameters(code, num_images)
    known = {key: one for key, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
    takes_any = takes_rest and len(known) < len(parameters)
    for key, value in given.items():
        where = f"{FLAG} {key}={value}"
        if key not in known:
            if takes_any:
                continue
            takes_these = f"Known: {', '.join(sorted(known))}." if known else "It takes none."
            raise ConfigError(f"{where}: unknown to {name}. {takes_these}")
        default = known[key].default
        if isinstance(default, PLAIN) and not _fits(value, default):
            raise ConfigError(f"{where}: {name} expects {type(default).__name__}.")
    arguments = {key: one.default for key, one in known.items() if one.default is not one.empty}
    missing = known.keys() - arguments.keys() - given.keys()
    if missing:
        raise ConfigError(f"{name}: needs {FLAG} {min(missing)}=….")
    return arguments | dict(given)


def _parameters(code: Callable[..., Any], num_images: int) -> dict[str, inspect.Parameter]:
    """Return what a user may give, by name."""
    try:
        found = list(inspect.signature(code).parameters.values())
    except (TypeError, ValueError):  # of some built-in functions
        return {}
    return {
        one.name: one
        for one in found[num_images:]
        if one.kind not in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL)
        and one.name not in FROM_THE_RUN
    }


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, float) and type(value) is int:
        return True
    return type(value) is type(default)


def takes(code: Callable[..., Any], name: str) -> bool:
    """Tell whether code has a parameter of this name."""
    try:
        return name in inspect.signature(code).parameters
    except (TypeError, ValueError):
        return False


def arguments_text(arguments: Mapping[str, Any]) -> str:
    """Return arguments as text that is the same for the same values."""
    numbers = {
        key: float(value) if type(value) is int else value for key, value in arguments.items()
    }
    return json.dumps(numbers, sort_keys=True, ensure_ascii=False, default=repr)
