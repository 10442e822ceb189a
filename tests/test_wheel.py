"""A wheel of this project, installed elsewhere, has every package and the miniature, and runs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("common", "sd3", "shards", "precompute", "train", "infer", "demo")


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the files that git knows, as from a fresh clone."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((REPOSITORY / name).read_bytes())
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_module_and_the_miniature(wheel: Path) -> None:
    present = set(zipfile.ZipFile(wheel).namelist())
    files = [path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py")]
    files += [path for path in (REPOSITORY / "demo/miniature").rglob("*") if path.is_file()]
    files += list((REPOSITORY / "demo").glob("*.jinja"))
    wanted = {path.relative_to(REPOSITORY).as_posix() for path in files}
    assert len(wanted) > 150
    assert wanted <= present
    assert not [name for name in present if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    pip("install", "--no-deps", "--target", installed, wheel)
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def python(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in PACKAGES:
        where = python("-c", f"import {package}; print({package}.__file__)").strip()
        assert Path(where).is_relative_to(installed)
    python("-m", "demo.circles", "--output-dir", "circles", "--num-rows", 4, "--num-unseen", 1)
    base = ("--pretrained-model-name-or-path", installed / "demo/miniature")
    small = ("--resolution", 64, "--text-dtype", "float32", "--device", "cpu")
    python("-m", "precompute", *base, "--source", "circles/train", "--cache", "cache", *small)
    assert "4 records" in python("-m", "shards", "info", "cache")
    settings = ("--num-controlnet-layers", 2, "--max-train-steps", 1, "--validation-steps", 0)
    python("-m", "train", *base, "--cache", "cache", "--output-dir", "out", *settings)
    assert (tmp_path / "out/diffusion_pytorch_model.safetensors").is_file()
