"""Skipped tests: a skip is an error, unless its reason is one of these."""

import re
from collections.abc import Generator
from typing import Any

import pytest

# The reason that pytest reports, and where such a test runs instead.
ALLOWED = {
    r"a GPU can|there is a GPU": "`make check` on a machine without a GPU",
    r"this torch has a CUDA of its own": "`make check` with PyTorch's build for CPUs, as in CI",
    r"needs a GPU|needs two GPUs( of one kind)?|needs Ada, Hopper or later": "`make gpu`",
    r"neither Chromium nor Google Chrome is installed": "`make check` where one is: apt or brew",
    r"\d+ page faults by default": "`make check` where the system gives no huge pages",
    r"glibc's malloc": "`make check` on Linux",
    r"REFERENCE_SCRIPT names no train_controlnet_sd3\.py": "as CONTRIBUTING.md says",
}

Hook = Generator[None, Any, Any]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Hook:
    """Turn a test's skip into a failure."""
    return _judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Hook:
    """Turn the skip of a whole file into a failure."""
    return _judged((yield))


def _judged(report: Any) -> Any:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.fullmatch(allowed, reason) for allowed in ALLOWED):
            report.outcome = "failed"
            report.longrepr = (
                f"{report.nodeid}: skipped ({reason}), for a reason that tests/skips.py does not "
                "list. Give the test what it needs; or list the reason and which target runs it."
            )
    return report
