"""The user's files as modules: what lies beside a file can be imported, for that file alone.

Two files may each have a helper beside them, of one name: each gets its own.
"""

import builtins
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from xxhash import xxh3_64_hexdigest

# Each folder of such files is a package, under a name that nobody else has.
PREFIX = "annotators_in_"
# Folders at the end of the path, for what is imported by other means: whole networks in pickles.
_on_path: set[str] = set()


def import_file(path: Path) -> ModuleType:
    """Return a file as a module, as Python runs it; the same module if it is imported again.

    Args:
        path: absolute.

    Raises:
        Exception: whatever the file raises.
    """
    digest = xxh3_64_hexdigest(str(path).encode())
    name = f"annotator_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    package = _package(path.parent)
    spec = spec_from_file_location(name, path, loader=_Loader(package, name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def is_beside(folder: Path, top: str) -> bool:
    """Tell whether a file in a folder that imports `top` gets what lies beside it.

    Nothing of ours or of a library is replaced: it does not if `top` can be imported anyway.
    """
    if not ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
        return False
    path = [entry for entry in sys.path if entry not in _on_path]
    return top not in sys.builtin_module_names and PathFinder.find_spec(top, path) is None


def _package(folder: Path) -> str:
    """Return the name of the package that a folder is."""
    name = f"{PREFIX}{xxh3_64_hexdigest(str(folder).encode())}"
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
            _on_path.add(str(folder))
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    return name


class _Finder(MetaPathFinder):
    """Finds the modules of such packages."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if not package.startswith(PREFIX):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(package, fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Loads modules in which `import` looks beside the file.

    Args:
        package: the folder's.
        fullname: of the module.
        path: of its file.
    """

    def __init__(self, package: str, fullname: str, path: str) -> None:
        super().__init__(fullname, path)
        self.package = package

    def exec_module(self, module: ModuleType) -> None:
        own = {"__import__": partial(_import, self.package)}
        vars(module)["__builtins__"] = vars(builtins) | own
        super().exec_module(module)


def _import(
    package: str,
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """Import as Python's own `__import__` does; what lies beside the file from the package."""
    top = name.partition(".")[0]
    if level or not is_beside(Path(sys.modules[package].__path__[0]), top):
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or ())
    return module if fromlist else sys.modules[f"{package}.{top}"]
