"""What happens on two GPUs, on a machine without one: each file of scenarios in a process."""

from pathlib import Path

import pytest
import torch

from tests.conftest import run_python

SCENARIOS = Path(__file__).parent / "scenarios"


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA of its own")
@pytest.mark.extras
def test_the_scenarios_pass() -> None:
    files = sorted(SCENARIOS.glob("[a-z]*.py"))
    done = run_python("-m", "tests.devices.stand_in", "pytest", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
