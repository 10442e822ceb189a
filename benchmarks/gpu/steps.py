"""What `make gpu` runs, one process after another, and how long each may take."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Size = Literal["full", "tiny"]
CUT = 124  # the exit code of a step that its budget cuts, as that of timeout(1)


@dataclass(frozen=True)
class Step:
    """A process of its own.

    Attributes:
        name: also that of its log.
        arguments: Python's.
        budget_s: seconds after which it is ended.
    """

    name: str
    arguments: tuple[str, ...]
    budget_s: int


# Of each benchmark: at its true size, and in small.
OPTIONS: dict[str, dict[Size, tuple[str, ...]]] = {
    "train_step": {"full": ("--keep",), "tiny": ("--keep", "--tiny")},
    "precompute": {
        "full": ("--true-size",),
        "tiny": ("--images=4", "--resolution=64", "--rows=200"),
    },
    "presets": {"full": (), "tiny": ("--tiny",)},
    "loader": {
        "full": ("--images=200", "--shards=500", "--records=200000"),
        "tiny": ("--images=40", "--shards=20", "--records=20000"),
    },
}
BUDGETS_S = {"tests": 400, "train_step": 660, "precompute": 150, "presets": 240, "loader": 50}


def plan(size: Size, results: Path) -> list[Step]:
    """Return the steps, in order.

    Args:
        size: `full` for a machine with a GPU, `tiny` to run every line of it on any machine.
        results: folder of the JSON files.
    """
    # Libraries warn of what they please on a card; that fails no test here.
    arguments: dict[str, tuple[str, ...]]
    arguments = {"tests": ("pytest", "tests/gpu", "-m", "gpu", "-W", "default")}
    for name, options in OPTIONS.items():
        file = str(results / f"{name}.json")
        arguments[name] = (f"benchmarks.{name}", "--json", file, *options[size])
    whole = sum(BUDGETS_S.values())  # how fast a CPU is at `tiny` is not asked
    return [
        Step(name, ("-m", *words), BUDGETS_S[name] if size == "full" else whole)
        for name, words in arguments.items()
    ]


def run(step: Step, log: Path, size: Size) -> tuple[int, float]:
    """Run a step; return its exit code and the seconds that it took.

    Args:
        step: the step.
        log: file for what it prints.
        size: with `tiny`, the tests run on the CPU, and nothing sees a GPU.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if size == "tiny":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS_ON": "cpu"}
    start = time.monotonic()
    with log.open("w") as out, _group(step.arguments, out.fileno(), environment) as process:
        try:
            code = process.wait(step.budget_s)
        except subprocess.TimeoutExpired:
            code = CUT
    return code, time.monotonic() - start


@contextlib.contextmanager
def _group(
    arguments: tuple[str, ...], out: int, environment: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start Python in a process group of its own; end all that is left of it afterwards."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
