"""What an annotator's drawings depend on: its own modules, and the files that these name."""

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

INSTALLED = [
    Path(path).resolve()
    for name, path in sysconfig.get_paths().items()
    if name in ("stdlib", "platstdlib", "purelib", "platlib")
]
LONGEST_NAME = 1024
# A folder that holds a model has one.
CONFIG = "config.json"


def own_sources(module_name: str) -> dict[Path, ast.Module]:
    """Return the parsed sources of a module and of all modules of the user's that it imports.

    Those of the standard library and of installed packages are left out, as their versions are;
    of an installed annotator its own package is taken.

    Args:
        module_name: of a module that can be imported; its source comes first.

    Raises:
        OSError: a source cannot be read.
        SyntaxError: a source cannot be parsed.
    """
    found: dict[Path, ast.Module] = {}
    waiting, package = [module_name], module_name.partition(".")[0]
    while waiting:
        name = waiting.pop()
        path = _source(name, package)
        if path is not None and path not in found:
            found[path] = ast.parse(path.read_bytes())
            inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
            waiting += _imported(found[path], inside)
    return found


def named_files(sources: dict[Path, ast.Module]) -> list[Path]:
    """Return the files that sources name in plain text, and those of models' folders, ascending.

    A name is looked for in the present folder and beside the source. Parts that are joined with `/`
    or in a call, such as `os.path.join`, make one name.
    """
    found = set()
    for source, tree in sources.items():
        for name in set(_names(tree)):
            for folder in (Path(), source.parent):
                found.update(_files(folder / name))
    return sorted(found - sources.keys())


def _source(name: str, package: str) -> Path | None:
    """Return the source file of a module if it is the user's own."""
    top = name.partition(".")[0]
    try:
        # First the topmost package, which is found without importing anything.
        specs = [importlib.util.find_spec(top)]
        if _is_own(specs[0], top == package) and name != top:
            specs.append(importlib.util.find_spec(name))
    except (ImportError, ValueError, AttributeError):
        return None
    if len(specs) == 1 and name != top:
        return None
    spec = specs[-1]
    own = spec is not None and spec.origin and _is_own(spec, top == package)
    return Path(str(spec.origin)).resolve() if spec is not None and own else None


def _is_own(spec: object, same_package: bool) -> bool:
    origin = getattr(spec, "origin", None)
    locations = list(getattr(spec, "submodule_search_locations", None) or [])
    where = origin if origin and origin.endswith(".py") else (locations or [None])[0]
    if where is None:
        return False
    path = Path(where).resolve()
    return same_package or not any(path.is_relative_to(folder) for folder in INSTALLED)


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
        for name in names:  # importing a module imports its packages
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


def _files(path: Path) -> list[Path]:
    try:
        if path.is_file():
            return [path.resolve()]
        if (path / CONFIG).is_file():
            return [file.resolve() for file in path.iterdir() if file.is_file()]
    except OSError:  # no name of a file
        pass
    return []
