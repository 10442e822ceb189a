"""The arrows between the packages, and what importing a stage brings in."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

ALLOWED = {
    "shards": set(),
    "precompute": {"shards"},
    "train": {"shards"},
    "infer": {
        "shards",
        "precompute.buckets",
        "precompute.images",
        "precompute.opening",
        "precompute.sources",
    },
    "demo": {"shards", "precompute", "train", "infer"},
}


def imported_modules(package: str) -> set[str]:
    names: set[str] = set()
    for path in (REPOSITORY / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_only_what_the_design_allows(package: str) -> None:
    for name in imported_modules(package):
        root = name.split(".")[0]
        if root in ALLOWED and root != package:
            allowed = ALLOWED[package]
            assert any(name == one or name.startswith(one + ".") for one in allowed), name


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_training_imports_no_data_set_library_no_text_encoder_and_no_vae() -> None:
    loaded = loaded_modules("import train.run")
    assert "diffusers.models.controlnets.controlnet_sd3" in loaded
    for name in (
        "datasets",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "diffusers.models.autoencoders.autoencoder_kl",
    ):
        assert name not in loaded


@pytest.mark.parametrize("package", ["precompute", "train", "infer", "shards"])
def test_a_command_line_is_parsed_before_heavy_libraries_load(package: str) -> None:
    loaded = loaded_modules(f"import {package}.__main__")
    assert "diffusers" not in loaded
    assert "transformers" not in loaded
