"""--optimizer-args: `key=value` as Python literals, held against what a class takes."""

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import ConfigError
from common.options import split_arguments

FLAG = "--optimizer-args"
# What a run gives an optimiser itself.
FROM_THE_RUN = ("params", "lr")


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of `key=value` texts.

    Raises:
        ConfigError: a text has no key or no `=`, its value is no literal, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for text, key, value in split_arguments(FLAG, texts, "betas=0.9,0.99"):
        if key == "lr":
            raise ConfigError(f"{FLAG} {text}: give --learning-rate {value}.")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ConfigError(
                f"{FLAG} {text}: expected a Python literal: a number, True, None, (0.9, 0.99) or "
                "text between quotes."
            ) from error
    return found


def check_arguments(optimizer: str, kind: type[Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that a class does not take, or whose type is not that of its default.

    Args:
        optimizer: as `--optimizer` names it, for errors.
        kind: its class.
        given: values by name.

    Raises:
        ConfigError: naming the argument, and what the class takes.
    """
    parameters = inspect.signature(kind).parameters.values()
    known = {
        one.name: one.default
        for one in parameters
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and one.name not in FROM_THE_RUN
    }
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    for key, value in given.items():
        where = f"{FLAG} {key}={value}"
        if key in known:
            if expected := _mismatch(value, known[key]):
                raise ConfigError(f"{where}: --optimizer {optimizer} expects {expected}.")
        elif not takes_any:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes none"
            raise ConfigError(f"{where}: unknown; --optimizer {optimizer} {takes}.")


def _mismatch(value: Any, default: Any) -> str | None:
    """Return in words what a default's type asks for, if a value has another; else None."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "True or False"
    if isinstance(default, int | float):
        return None if _is_number(value) else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, tuple | list) and len(value) == len(default)
        fits = fits and all(_mismatch(*pair) is None for pair in zip(value, default, strict=True))
        return None if fits else f"{len(default)} values as in {default}"
    if isinstance(default, str):
        return None if isinstance(value, str) else "text between quotes"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
