"""The arrows between the folders, the size of the folders, and what importing a stage brings in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# From the bottom to the top: a folder imports only from itself, and from the folders and the single
# files that are named for it. "shards" alone means the files directly in shards/.
CACHE = {
    "common",
    "common.memory",
    "sd3",
    "sd3.base",
    "sd3.controlnet",
    "shards.format",
    "shards.format.published",
    "shards.reading",
    "shards.remote",
}
STAGE = CACHE | {"sd3.annotators", "shards"}
PLANNING = {
    "precompute.sources",
    "precompute.fingerprints",
    "precompute.planning",
    "precompute.planning.views",
}
PRECOMPUTE = PLANNING | {"precompute.encoding", "precompute.memory", "precompute"}
BELOW_SAVING = {"train.processes", "train.optim", "train.validation", "train.watch"}
TRAIN = BELOW_SAVING | {
    "train",
    "train.continued",
    "train.dashboard",
    "train.evaluation",
    "train.memory",
    "train.saving",
    "train.sets",
}
INFER = {"infer", "infer.drawing", "infer.exporting", "infer.memory", "infer.scoring"}
DRAWING = {
    "infer.batches",
    "infer.config",
    "infer.convention",
    "infer.loaded_base",
    "infer.photographs",
    "infer.pipeline",
}
NETWORKS = {"train.config", "train.data", "train.loss", "train.models", "train.objective"}
PRODUCT = STAGE | PRECOMPUTE | TRAIN | INFER
ALLOWED = {
    "common.memory": set(),
    "common": {"common.memory"},
    "sd3.base": {"common", "sd3"},
    "sd3.controlnet": {"common", "sd3"},
    "sd3": {"common"},
    "sd3.annotators": {"common", "common.memory", "sd3"},
    "shards.format.published": {"common", "shards.format"},
    "shards.format": {"common", "sd3", "shards.format.published"},
    "shards.reading": {"common", "sd3", "shards.format"},
    "shards.remote": {
        "common",
        "sd3",
        "shards.format",
        "shards.format.published",
        "shards.reading",
    },
    "shards": CACHE,
    "precompute.sources.webdataset": STAGE | {"precompute.sources", "precompute.sources.files"},
    "precompute.sources.parquet": STAGE | {"precompute.sources", "precompute.sources.files"},
    "precompute.sources.files": STAGE
    | {
        "precompute.sources.caches",
        "precompute.sources.counted",
        "precompute.sources.file_versions",
        "precompute.sources.patient_read",
        "precompute.sources.source",
        "precompute.sources.splits",
    },
    "precompute.sources": STAGE
    | {"precompute.sources.files", "precompute.sources.parquet", "precompute.sources.webdataset"},
    "precompute.fingerprints": STAGE | {"precompute.config", "precompute.sources"},
    "precompute.planning.views": {"sd3"},
    "precompute.planning": STAGE
    | {
        "precompute.config",
        "precompute.sources",
        "precompute.fingerprints",
        "precompute.planning.views",
    },
    "precompute.encoding": STAGE | PLANNING | {"precompute.memory.layer_groups"},
    "precompute.memory": STAGE | PLANNING | {"precompute.config", "precompute.encoding"},
    "precompute": STAGE | PRECOMPUTE,
    "train.watch": {"common", "train.config"},
    "train.processes": STAGE | {"train.config"},
    "train.sets": STAGE | {"train.config"},
    "train.optim": STAGE | {"train.config", "train.processes", "train.watch"},
    "train.memory": STAGE | NETWORKS | {"train.distribution", "train.optim", "train.sets"},
    "train.validation": STAGE
    | NETWORKS
    | {"train.assembly", "train.processes", "train.optim", "train.watch"},
    "train.saving": STAGE | BELOW_SAVING | {"train.assembly", "train.config"},
    "train.dashboard": STAGE | BELOW_SAVING | {"train.assembly", "train.config", "train.inputs"},
    "train.evaluation": STAGE | BELOW_SAVING | {"train.assembly", "train.config", "train.saving"},
    "train.continued": STAGE | {"train.config", "train.processes", "train.saving"},
    "train": STAGE | TRAIN,
    "infer.memory": STAGE | PRECOMPUTE | TRAIN | {"infer.config", "infer.convention", "infer.vae"},
    "infer.exporting": STAGE | {"infer.config"},
    "infer": STAGE | PRECOMPUTE | TRAIN | INFER,
    "infer.drawing": STAGE | PRECOMPUTE | TRAIN | DRAWING,
    "infer.scoring": STAGE | PRECOMPUTE | TRAIN | DRAWING | {"infer.drawing"},
    "demo.base_model": PRODUCT | {"demo.circles", "demo.colors"},
    "demo": PRODUCT | {"demo.base_model"},
    "benchmarks": PRODUCT | {"demo", "demo.base_model"},
    "benchmarks.loader": PRODUCT | {"benchmarks.synthetic"},
    "benchmarks.gpu": {"common"},
    "benchmarks.memory": PRODUCT
    | {"benchmarks.bases", "benchmarks.random_weights", "benchmarks.synthetic", "demo"},
    "benchmarks.reference": PRODUCT
    | {"demo", "demo.base_model", "benchmarks.bases", "benchmarks.random_weights"},
}
# A user's own code is imported by its name, and so is a named optimiser's; nothing else is.
BY_NAME = {"sd3.annotators.own", "train.optim.optimizer"}
PACKAGES = {folder.split(".")[0] for folder in ALLOWED}
MOST_MODULES = 14
MOST_LINES = 70


def modules() -> dict[str, Path]:
    """Return all modules of ours by dotted name; a package's `__init__` by the package's."""
    return {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for package in sorted(PACKAGES)
        for path in sorted((REPOSITORY / package).rglob("*.py"))
    }


MODULES = modules()


def folder_of(module: str) -> str:
    is_package = MODULES[module].name == "__init__.py"
    return module if is_package else module.rpartition(".")[0]


def imported(path: Path) -> Iterator[str]:
    """Give the modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in MODULES:  # down from an attribute to its module
                name = name.rpartition(".")[0]
            if name:
                yield name


def test_every_top_folder_with_code_is_known() -> None:
    folders = {path.parent.name for path in REPOSITORY.glob("[!.]*/*.py")}
    assert folders == PACKAGES | {"tests"}


def test_every_folder_of_ours_has_its_arrows() -> None:
    assert {folder_of(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("folder", ALLOWED)
def test_no_arrow_between_folders_runs_up(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder}
    for module, path in MODULES.items():
        if folder_of(module) == folder:
            for name in imported(path):
                assert {name, folder_of(name)} & allowed, f"{module} imports {name}"
            by_name = "import_module(" in path.read_text(encoding="utf-8")
            assert not by_name or module in BY_NAME, f"{module} imports by name"


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return names that import each other in a circle, or nothing."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(arrows[name]):
                if found := walk(other, [*path, name]):
                    return found
            done.add(name)
        return []

    for name in arrows:
        if found := walk(name, []):
            return found
    return []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle({module: set(imported(path)) for module, path in MODULES.items()}) == []


def test_no_folder_is_crowded() -> None:
    folders = [path.parent for path in MODULES.values()]
    folders += [path.parent for path in (REPOSITORY / "tests").rglob("test_*.py")]
    for folder in set(folders):
        names = [path.name for path in folder.glob("*.py")]
        count = len(set(names) - {"__init__.py", "__main__.py"})
        assert count <= MOST_MODULES, f"{folder}: {count} modules"


@pytest.mark.parametrize("path", MODULES.values(), ids=MODULES)
def test_every_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES, f"{path}: {node.name} has {lines} lines"


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


COMMANDS = [
    ["precompute"],
    ["train"],
    ["infer"],
    *(["infer", name] for name in ("generate", "show", "score", "serve", "decode", "export")),
    ["shards"],
    *(["shards", name] for name in ("info", "seal", "verify", "preview", "pull", "push")),
    ["demo"],
    ["demo.circles"],
    ["demo.photographs"],
]
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "datasets"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_loads_no_heavy_library(command: list[str]) -> None:
    arguments = [*command[1:], "--help"]
    assert not HEAVY & loaded_modules(
        f"""
import contextlib, io, runpy, sys
sys.argv = ["", *{arguments}]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_module({command[0]!r}, run_name="__main__", alter_sys=True)
"""
    )
