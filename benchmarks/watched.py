"""Run a training program, ours or the reference, and note when its steps end and what it takes.

    python -m benchmarks.watched FIGURES train [its arguments]
    python -m benchmarks.watched FIGURES path/to/train_controlnet_sd3.py [its arguments]

FIGURES becomes JSON: `times` of the ends of steps, in seconds since the epoch, which both programs
log; `host_bytes` and `device_bytes`, the most memory there was. Neither program is changed.
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

from benchmarks.reference_shim import stand_in_for_torchvision


def main() -> None:
    """Watch, run, and write the figures."""
    figures, program = sys.argv[1:3]
    sys.argv = [program, *sys.argv[3:]]
    times: list[float] = []
    log = accelerate.Accelerator.log

    def watched(self: Any, values: dict[str, Any], *arguments: Any, **more: Any) -> None:
        if "loss" in values:
            times.append(time.time())
        log(self, values, *arguments, **more)

    accelerate.Accelerator.log = watched
    # Ours ends with SystemExit, as commands do.
    atexit.register(write, figures, times)
    if program.endswith(".py"):
        if importlib.util.find_spec("torchvision") is None:
            stand_in_for_torchvision()
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def write(figures: str, times: list[float]) -> None:
    """Write what was noted."""
    on_gpu = torch.cuda.is_available()
    found = {
        "times": times,
        "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    Path(figures).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
