"""No test is left out without a reason that is listed."""

from pathlib import Path

import pytest

from tests import skips
from tests.conftest import run_python

OF_A_TEST = """
import pytest


def test_left_out():
    pytest.skip({reason!r})


@pytest.mark.skipif(True, reason={reason!r})
def test_marked():
    assert False


@pytest.mark.xfail
def test_expected():
    assert False


def test_taken():
    pass
"""
OF_A_FILE = "import pytest\n\npytest.importorskip('no_such_package')\n"


def ended(path: Path, source: str) -> str:
    """Return the last line of pytest's output for one file."""
    path.write_text(source)
    options = (
        "-q",
        "-c",
        path.with_name("none.ini"),
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.skips",
    )
    path.with_name("none.ini").write_text("[pytest]\n")
    lines = run_python("-m", "pytest", *options, path).stdout.splitlines()
    return lines[-1].rpartition(" in ")[0]


@pytest.mark.slow
def test_only_listed_reasons_skip(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    assert (
        ended(file, OF_A_TEST.format(reason="no time")) == "1 failed, 1 passed, 1 xfailed, 1 error"
    )
    listed = OF_A_TEST.format(reason="needs a GPU")
    assert ended(file, listed) == "1 passed, 2 skipped, 1 xfailed"
    assert ended(file, OF_A_TEST.format(reason="needs a GPU, or time")).startswith("1 failed")
    assert ended(file, OF_A_FILE) == "1 error"


def test_these_tests_are_watched(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.is_registered(skips)
