"""TOML files of settings: one table per stage, checked against the stage's config dataclass."""

import dataclasses
import difflib
import math
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.errors import ConfigError

# The type of a setting that is a number or `auto`.
NUMBER_OR_WORD = (int | Literal["auto"],)
EXTENDS = "extends"
GIVES_UP = "gives_up"  # of a card's preset
SECTIONS = (
    "demo",
    "circles",
    "precompute",
    "train",
    "infer",
    "score",
    "serve",
    "decode",
    "export",
    GIVES_UP,
)


def read_section(path: Path, section: str, config_class: type[Any]) -> dict[str, Any]:
    """Return the settings of one stage in a TOML file, as keyword arguments of its config class.

    A file may begin with `extends = "other.toml"`, a path relative to its own folder. It then
    changes the settings of that file, key by key.

    Raises:
        ConfigError: a file cannot be read, is not TOML, or holds an unknown table, an unknown
            key or a value of the wrong type; or files extend each other in a circle.
    """
    settings: dict[str, Any] = {}
    for file, document in _documents(path):
        settings |= _settings(file, document, section, config_class)
    return settings


def config_files(path: Path) -> list[Path]:
    """Return a file and the files that it extends, in the order in which they apply.

    Raises:
        ConfigError: a file cannot be read or is not TOML; or files extend each other in a circle.
    """
    return [file for file, _ in _documents(path)]


def aliases(config_class: type[Any]) -> dict[str, str]:
    """Return the further names of a config's fields, and the field that each stands for."""
    return {
        alias: field.name
        for field in dataclasses.fields(config_class)
        for alias in field.metadata.get("aliases", ())
    }


def switches(config_class: type[Any]) -> dict[str, tuple[str, dict[bool, Any]]]:
    """Return flags that stand for values of a field: its name, and the values if given or not."""
    return {
        switch: (field.name, {True: value, False: field.default})
        for field in dataclasses.fields(config_class)
        for switch, value in field.metadata.get("switches", {}).items()
    }


def _documents(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return a file and the files that it extends, with what they hold, the extended ones first."""
    documents = [(path, _document(path))]
    while (extended := documents[-1][1].get(EXTENDS)) is not None:
        last, _ = documents[-1]
        if not isinstance(extended, str) or not extended:
            raise ConfigError(f"{last}: extends: expected a path, found {extended!r}.")
        file = last.parent / extended
        if not file.is_file():
            raise ConfigError(f"{last}: extends {extended!r}, and {file} is no file.")
        if file.resolve() in [known.resolve() for known, _ in documents]:
            raise ConfigError(f"{last}: extends {extended!r}, which extends this file.")
        documents.append((file, _document(file)))
    return documents[::-1]


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from error


def _settings(
    path: Path, document: dict[str, Any], section: str, config_class: type[Any]
) -> dict[str, Any]:
    """Return the settings of one stage that stand in one file."""
    for name in document:
        if name not in (*SECTIONS, EXTENDS):
            known = [*SECTIONS, EXTENDS]
            raise ConfigError(f"{path}: unknown table [{name}].{nearest(name, known)}")
    hints = get_type_hints(config_class)
    field_names = aliases(config_class)
    flags = switches(config_class)
    table = document.get(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {section} must be a table, [{section}], found {table!r}.")
    settings: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        where = f"{path}: {key} in [{section}]"
        if name in flags:
            name, values = flags[name]
            value = values[_checked(value, bool, where)]
        name = field_names.get(name, name)
        if name in settings:
            raise ConfigError(f"{path}: {name} is given twice in [{section}], as {key!r} too.")
        if name == EXTENDS:
            raise ConfigError(f"{path}: {EXTENDS} belongs at the top, above all tables.")
        if name not in hints:
            raise ConfigError(
                f"{path}: unknown key {key!r} in [{section}].{nearest(name, list(hints))}"
            )
        settings[name] = _checked(value, hints[name], where)
    return settings


def _checked(value: Any, hint: Any, where: str) -> Any:
    multiple, kind = unwrap(hint)
    if multiple:
        if not isinstance(value, list):
            value = [value]
        return tuple(_checked(item, kind, where) for item in value)
    if kind in NUMBER_OR_WORD:
        if value == "auto":
            return value
        kind = int
    choices = get_args(kind) if get_origin(kind) is Literal else None
    expected = type(choices[0]) if choices else str if kind is Path else kind
    # TOML distinguishes 1, 1.0 and true; only an integer in place of a float is harmless.
    fits = type(value) is expected or (expected is float and type(value) is int)
    if not fits:
        raise ConfigError(f"{where}: expected {expected.__name__}, found {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, found {value}.")
    if choices and value not in choices:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}.")
    return Path(value) if kind is Path else value


def nearest(name: str, known: list[str]) -> str:
    """Return a hint for an error message: the most similar known name, or all known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def unwrap(hint: Any) -> tuple[bool, Any]:
    """Return whether a field takes several values, and the type of one value."""
    if get_origin(hint) is tuple:
        return True, get_args(hint)[0]
    if get_origin(hint) in (types.UnionType, Union) and hint not in NUMBER_OR_WORD:
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    return False, hint
