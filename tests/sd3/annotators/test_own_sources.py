"""Which files an annotator is known by."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sd3.annotators.own_sources import named_files, own_sources
from sd3.annotators.registry import find_annotator

DRAWN = "\n\ndef drawn(image):\n    return image\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's own, whose modules can be imported."""
    before = set(sys.modules)
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.syspath_prepend(own)
    yield own
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_libraries_are_not_the_users_own(folder: Path) -> None:
    (folder / "annotator_a.py").write_text(
        "import numpy\nimport torch\nfrom PIL import Image\nimport json, helper_a\n" + DRAWN
    )
    (folder / "helper_a.py").write_text("import scipy.ndimage\n")
    assert set(own_sources("annotator_a")) == {folder / "annotator_a.py", folder / "helper_a.py"}


def test_another_pythons_libraries_are_not_the_users_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder / "venv" / "lib" / "python3.9" / "dist-packages"
    (elsewhere / "debians").mkdir(parents=True)
    (elsewhere / "debians" / "__init__.py").write_text("")
    (elsewhere / "single.py").write_text("")
    monkeypatch.syspath_prepend(elsewhere)
    (folder / "annotator_b.py").write_text("import debians\nimport single\n" + DRAWN)
    assert set(own_sources("annotator_b")) == {folder / "annotator_b.py"}


def test_an_installed_annotators_own_package_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = folder / "site-packages" / "aux_like"
    (package / "edges").mkdir(parents=True)
    for name in ("__init__.py", "edges/__init__.py"):
        (package / name).write_text("")
    (package / "edges" / "draw.py").write_text("from ..common import x\nimport numpy\n" + DRAWN)
    (package / "common.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(folder / "site-packages")
    found = {str(path.relative_to(package)) for path in own_sources("aux_like.edges.draw")}
    assert found == {"__init__.py", "edges/__init__.py", "edges/draw.py", "common.py"}


def test_nothing_is_imported_and_what_cannot_be_parsed_still_counts(folder: Path) -> None:
    broken = folder / "broken_c"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (broken / "sub.py").write_text("print 'of Python 2'\n")
    guarded = "try:\n    import broken_c.sub\nexcept Exception:\n    pass\n"
    (folder / "annotator_c.py").write_text(guarded + DRAWN)
    found = find_annotator("annotator_c:drawn")
    assert len(found.identity) == 1 + 3  # its name, and three files
    (broken / "sub.py").write_text("print 'of Python 2, edited'\n")
    assert find_annotator("annotator_c:drawn").identity != found.identity


def test_weights_count_and_logs_do_not(folder: Path) -> None:
    (folder / "annotator_d.py").write_text(
        f"WEIGHTS = 'edges.onnx'\nLOG = {str(folder / 'drawn.log')!r}\n" + DRAWN
    )
    for name in ("edges.onnx", "drawn.log"):
        (folder / name).write_text(name)
    assert named_files(own_sources("annotator_d")) == [folder / "edges.onnx"]
