"""The notebook of a first run, from top to bottom."""

import os
import sys
from pathlib import Path

import pytest

from tests.mutation.__main__ import copy_repository

NOTEBOOK = "first-run.ipynb"


@pytest.mark.slow
@pytest.mark.extras
def test_the_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    project = tmp_path / "project"
    copy_repository(project)
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
