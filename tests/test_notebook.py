"""The notebook of a first run, from top to bottom."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

NOTEBOOK = "first-run.ipynb"


def copy_of_the_project(folder: Path) -> Path:
    """The files that git knows, so that a run writes nothing into the project."""
    listed = subprocess.check_output(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        text=True,
    )
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.extras
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    project = copy_of_the_project(tmp_path / "project")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(project))
    for name in ("HOME", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(project / "docs" / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook, timeout=800, resources={"metadata": {"path": str(project / "docs")}}
    )
    client.execute()  # raises at the first cell that fails
    report, picture = (
        cell.outputs[-1].data
        for cell in notebook.cells
        if cell.cell_type == "code"
        and cell.outputs
        and cell.outputs[-1].output_type == "execute_result"
    )
    assert "text/html" in report
    assert "image/png" in picture
    assert (project / "own" / "controlnet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (project / "docs" / "own").exists()
