"""The commands that give no tensors answer without loading torch."""

import http.server
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.hub_server import serve_in_thread

HEAVY = ("torch", "diffusers", "transformers", "datasets")
CODE = """
import sys
from shards.__main__ import main
main(sys.argv[1:], prog_name="python -m shards", standalone_mode=False)
loaded = [name for name in {heavy} if name in sys.modules]
sys.exit(f"loaded: {{loaded}}" if loaded else 0)
"""


def run_lightly(*arguments: object) -> str:
    """Run `python -m shards`; return its output if no heavy library was loaded."""
    done = run_python("-c", CODE.format(heavy=HEAVY), *arguments, NO_PROXY="127.0.0.1")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("info", "CACHE"),
        ("info", "CACHE", "--json", "--shards"),
        ("verify", "CACHE"),
        ("seal", "CACHE"),
    ],
    ids=" ".join,
)
def test_a_command_that_gives_no_tensors_loads_no_torch(
    arguments: tuple[str, ...], cache: Path
) -> None:
    assert run_lightly(*(cache if argument == "CACHE" else argument for argument in arguments))


def test_pull_loads_no_torch(cache: Path, tmp_path: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=cache)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serve_in_thread(server)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        assert "complete" in run_lightly("pull", url, tmp_path / "pulled")
        server.shutdown()
