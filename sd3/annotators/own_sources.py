"""What an annotator's drawings depend on: its own modules, and the files that these name."""

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from sd3.annotators.own_files import is_beside

STANDARD_LIBRARY = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
# Of any Python: another's may be on the path, as Debian's is in some environments.
INSTALLED = {"site-packages", "dist-packages"}
# Files that programs write.
WRITTEN = {".err", ".lock", ".log", ".out", ".pid", ".tmp"}
LONGEST_NAME = 1024
# A folder that holds a model has one.
CONFIG = "config.json"


def own_sources(module_name: str, file: Path | None = None) -> dict[Path, ast.Module]:
    """Return the parsed sources of a module and of the user's other modules that it imports.

    The user's are those beside it and in the present folder. The standard library and installed
    packages are left out, as their versions are; of an installed annotator its own package is
    taken. Nothing is imported to find them.

    Args:
        module_name: of a module that can be imported; its source comes first. Empty for a file
            that is no part of a package.
        file: the file.

    Raises:
        OSError: a source cannot be read.
    """
    package = module_name.partition(".")[0]
    beside = file.parent if file is not None and not module_name else None
    own_folders = [Path.cwd(), *(location.parent for location in _locations(package, beside))]
    found: dict[Path, ast.Module] = {}
    waiting = list(_with_packages(module_name))
    if beside is not None and file is not None:
        own_folders.append(beside)
        found[file] = _parse(file)
        waiting = list(_imported(found[file], ""))
    while waiting:
        name = waiting.pop()
        path = _source(name, beside)
        if path is None or path in found:
            continue
        if name.partition(".")[0] != package and not _is_own(path, own_folders):
            continue
        found[path] = _parse(path)
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        waiting += _imported(found[path], inside)
    return found


def named_files(sources: dict[Path, ast.Module]) -> list[Path]:
    """Return the files that sources name in plain text, and those of models' folders, ascending.

    A name is looked for in the present folder and beside the source. Parts that are joined with `/`
    or in a call, such as `os.path.join`, make one name. Logs are left out: each run
    writes them.
    """
    found = set()
    for source, tree in sources.items():
        for name in set(_names(tree)):
            for folder in (Path(), source.parent):
                found.update(_files_of(folder / name))
    return sorted(path for path in found - sources.keys() if path.suffix not in WRITTEN)


def _locations(top: str, beside: Path | None) -> list[Path]:
    """Return where a topmost module or package lies, without importing it.

    Args:
        top: its name.
        beside: the folder of the file that imports it, unless that is part of a package.
    """
    if not top:
        return []
    if beside is not None and is_beside(beside, top):
        return [beside / top]
    try:
        spec = importlib.util.find_spec(top)
    except Exception:  # whatever the finders of other libraries raise
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(location).resolve() for location in spec.submodule_search_locations]
    is_source = spec.origin is not None and spec.origin.endswith(".py")
    return [Path(str(spec.origin)).resolve()] if is_source else []


def _source(name: str, beside: Path | None) -> Path | None:
    """Return the source file of a module, or None if it has none."""
    top, *below = name.split(".")
    for location in _locations(top, beside):
        module = location.joinpath(*below)
        for path in (module, module.with_name(f"{module.name}.py"), module / "__init__.py"):
            if path.suffix == ".py" and path.is_file():
                return path
    return None


def _is_own(path: Path, own_folders: list[Path]) -> bool:
    installed = not INSTALLED.isdisjoint(path.parts) or any(
        path.is_relative_to(folder) for folder in STANDARD_LIBRARY
    )
    return not installed and any(path.is_relative_to(folder) for folder in own_folders)


def _parse(path: Path) -> ast.Module:
    """Return a parsed source; an empty one for what this Python cannot parse."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the names of modules that a source may import, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from _with_packages(name)


def _with_packages(name: str) -> Iterator[str]:
    """Yield a module's packages and then itself: importing it imports them."""
    parts = name.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _names(tree: ast.Module) -> Iterator[str]:
    """Yield texts of a source that may be names of files."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Constant):
            parts = [node]
        elif isinstance(node, ast.Call):
            parts = node.args
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = list(_operands(node))
        texts = [part.value for part in parts if isinstance(part, ast.Constant)]
        name = os.path.join("", *(text for text in texts if isinstance(text, str)))  # noqa: PTH118
        if 0 < len(name) <= LONGEST_NAME and name.isprintable():
            yield name


def _operands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp):
        yield from _operands(node.left)
        yield node.right
    else:
        yield node


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder, ascending, but hidden ones and those that programs write.

    Raises:
        OSError: a folder cannot be read.
    """
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix not in WRITTEN
        and not any(
            part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts
        )
        and path.is_file()
    )


def _files_of(path: Path) -> list[Path]:
    """Return the file of this name, or the files of the model's folder of this name; or none."""
    try:
        if path.is_file():
            return [path.resolve()]
        if (path / CONFIG).is_file():
            return [file.resolve() for file in path.iterdir() if file.is_file()]
    except OSError:  # no name of a file
        pass
    return []
