"""Run `python -m train` with FSDP2 or DeepSpeed on CPUs, over gloo.

accelerate shares models out on GPUs and the like alone, though torch and DeepSpeed do so on CPUs
just as well. Here it is told that it may. With a folder in $RECORDS each process also notes there
what `tests.train.precision.records` notes.
"""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from tests.train.precision import fp16_on_cpu, records

initialise = state.AcceleratorState.__init__


def backend(*_: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_CPU


def initialised(self: Any, *arguments: Any, fsdp_plugin: Any = None, **more: Any) -> None:
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        # As accelerate's own initialisation does on GPUs.
        self.distributed_type = DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)


if __name__ == "__main__":
    state.PartialState._prepare_backend = backend
    state.AcceleratorState.__init__ = initialised
    fp16_on_cpu.allow()
    sys.argv = sys.argv[1:]
    folder = os.environ.get("RECORDS")
    path = Path(folder or "") / f"{os.environ['RANK']}.pt"
    with records.recorded_to(path) if folder else contextlib.nullcontext():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
