"""Runs a training program, ours or the reference, and records its steps' times and its memory.

    python -m benchmarks.reference.watch FIGURES train [its arguments]
    python -m benchmarks.reference.watch FIGURES path/to/train_controlnet_sd3.py [its arguments]

FIGURES becomes JSON: `times`, when each step's loss was logged, in seconds since the epoch;
`host_bytes` and `device_bytes`, the peaks of memory. Neither program is changed.
"""

import atexit
import importlib.util
import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import accelerate
import torch

from benchmarks.reference.shim import install_torchvision_substitute


def main() -> None:
    """Run the program, and write the figures when it ends."""
    figures, program = sys.argv[1:3]
    sys.argv = [program, *sys.argv[3:]]
    times: list[float] = []
    log = accelerate.Accelerator.log

    def log_with_time(self: Any, values: dict[str, Any], *arguments: Any, **more: Any) -> None:
        if "loss" in values:
            times.append(time.time())
        log(self, values, *arguments, **more)

    accelerate.Accelerator.log = log_with_time
    # Our program ends with SystemExit, so nothing runs after it here.
    atexit.register(write_figures, figures, times)
    if program.endswith(".py"):
        if importlib.util.find_spec("torchvision") is None:
            install_torchvision_substitute()
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def write_figures(figures: str, times: list[float]) -> None:
    """Write the times and the peaks of memory."""
    on_gpu = torch.cuda.is_available()
    content = {
        "times": times,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    Path(figures).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
