"""The user's own annotators: a function, or a class that draws batches."""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from xxhash import xxh3_64_hexdigest

from common.errors import ConfigError
from sd3.annotators.annotator import Annotator, DrawBatch
from sd3.annotators.arguments import arguments_text, bind_arguments, takes
from sd3.annotators.own_sources import files_of, named_files, own_sources

A_FILE = "a file"


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
    files = [file for value in changed.values() for file in _named_by(value)]
    # A file counts by its bytes, not by its name.
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
        files=sorted({*named_files(trees), *files}),
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
    path = path.resolve()
    name = f"annotator_{path.stem}_{xxh3_64_hexdigest(str(path).encode())}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: nothing of ours or of a library is replaced
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        raise ConfigError(f"{where}: fails ({type(error).__name__}: {error}).") from error
    return module


def _named_by(value: Any) -> list[Path]:
    """Return the files that an argument names: as text, or in a list."""
    if isinstance(value, list):
        return [file for one in value for file in _named_by(one)]
    return files_of(Path(value)) if isinstance(value, str) and value else []


def _without_names(value: Any) -> Any:
    """Return an argument without the names of files."""
    if isinstance(value, list):
        return [_without_names(one) for one in value]
    return A_FILE if _named_by(value) else value
