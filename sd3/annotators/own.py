"""The user's own annotators: a function, or a class that draws batches."""

import ast
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import ConfigError
from sd3.annotators.annotator import Annotator, DrawBatch
from sd3.annotators.arguments import arguments_text, bind_arguments, takes
from sd3.annotators.own_files import import_file
from sd3.annotators.own_sources import named_files, own_sources

A_FILE, A_FOLDER = "a file", "a folder"


def find_own(name: str, given: Mapping[str, Any]) -> Annotator:
    """Return the annotator that `package.module:name` or `path/to/file.py:name` stands for.

    Raises:
        ConfigError: there is no such code, its source cannot be read, or it takes other arguments.
    """
    where = f"--conditioning-from {name}"
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    if not place or not attribute or (place.startswith(".") and not is_file):
        raise ConfigError(f"{where}: expected package.module:name or path/to/file.py:name.")
    module = _from_file(where, Path(place)) if is_file else _from_path(where, place)
    code = getattr(module, attribute, None)
    if not callable(code):
        raise ConfigError(f"{where}: {place} has no such function.")
    is_class = inspect.isclass(code)
    try:
        source = Path(inspect.getfile(module)).resolve()
        trees = {source: ast.parse(source.read_bytes())}
        trees |= own_sources("" if is_file else place, source)
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in trees]
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: the source of {place} cannot be read, which is needed to notice changes "
            "of it."
        ) from error
    if is_class and not callable(getattr(code, "batch", None)):
        raise ConfigError(f"{where}: the class has no batch(images); give one, or a function.")
    arguments = bind_arguments(name, code, given, num_images=0 if is_class else 1)
    defaults = _defaults(name, code, is_class)
    changed = {key: arguments[key] for key in given if arguments[key] != defaults.get(key)}
    paths = [path for value in changed.values() for path in _named_by(value)]
    # A file counts by its bytes, and a folder by its files, not by its name.
    counted = {key: _without_names(value) for key, value in changed.items()}
    qualified = str(getattr(code, "__qualname__", ""))
    is_its_name = getattr(module, qualified, None) is code
    return Annotator(
        name=name,
        arguments=changed,  # the others stand in the code
        function=None if is_class else partial(code, **given) if given else code,
        load=partial(_load, code, dict(given)) if is_class else None,
        identity=[
            qualified if is_its_name else attribute,
            hashes[0],
            *sorted(hashes[1:]),
            *([arguments_text(counted)] if changed else []),
        ],
        files=sorted({*named_files(trees), *(path for path in paths if path.is_file())}),
        folders=sorted({path for path in paths if path.is_dir()}),
        former=[name, hashes[0]],
    )


def _defaults(name: str, code: Callable[..., Any], is_class: bool) -> dict[str, Any]:
    """Return the arguments of code that is given none; empty if it needs some."""
    try:
        return bind_arguments(name, code, {}, num_images=0 if is_class else 1)
    except ConfigError:
        return {}


def _load(code: Any, given: dict[str, Any], device: str) -> DrawBatch:
    """Return what draws batches with an object of the user's class."""
    chosen = {"device": device} if takes(code, "device") else {}
    draw: DrawBatch = code(**given, **chosen).batch
    return draw


def _from_path(where: str, place: str) -> ModuleType:
    """Return the module of this name, imported.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(place)
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(
            f"{where}: {place} cannot be imported "
            f"({type(error).__name__}: {error}); it must lie in this folder or be installed."
        ) from error


def _from_file(where: str, path: Path) -> ModuleType:
    """Return a file as a module; what lies beside it can be imported, as when Python runs it.

    Raises:
        ConfigError: there is no such file, or it fails.
    """
    if not path.is_file():
        raise ConfigError(f"{where}: no such file.")
    try:
        return import_file(path.resolve())
    except Exception as error:  # whatever the user's own code raises
        raise ConfigError(f"{where}: fails ({type(error).__name__}: {error}).") from error


def _named_by(value: Any) -> list[Path]:
    """Return the files and folders that an argument names: as text, or in a list.

    A folder around the present one names no files: there is no end of them.
    """
    if isinstance(value, list):
        return [path for one in value for path in _named_by(one)]
    if not isinstance(value, str) or not value:
        return []
    try:
        path = Path(value).resolve()
        is_folder = path.is_dir() and not Path.cwd().is_relative_to(path)
        return [path] if path.is_file() or is_folder else []
    except (OSError, ValueError):  # no name of a file
        return []


def _without_names(value: Any) -> Any:
    """Return an argument without the names of files and folders."""
    if isinstance(value, list):
        return [_without_names(one) for one in value]
    named = _named_by(value)
    return (A_FILE if named[0].is_file() else A_FOLDER) if named else value
