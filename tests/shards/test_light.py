"""The commands that give no tensors answer without loading torch."""

from pathlib import Path

import pytest

from tests.conftest import run_python

HEAVY = ("torch", "diffusers", "transformers", "datasets")
CODE = """
import sys
from shards.__main__ import main
main(sys.argv[1:], prog_name="python -m shards", standalone_mode=False)
loaded = [name for name in {heavy} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("info", "CACHE"),
        ("info", "CACHE", "--json", "--shards"),
        ("verify", "CACHE"),
        ("seal", "CACHE"),
        ("pull", "--help"),
        ("push", "--help"),
        ("preview", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_that_gives_no_tensors_loads_no_torch(
    arguments: tuple[str, ...], cache: Path
) -> None:
    given = [str(cache) if argument == "CACHE" else argument for argument in arguments]
    done = run_python("-c", CODE.format(heavy=HEAVY), *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout
