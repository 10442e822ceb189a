"""fp16 on the CPU: torch's autocast and GradScaler, which accelerate uses on GPUs alone."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

initialise = Accelerator.__init__


def initialised(self: Any, *arguments: Any, **more: Any) -> None:
    initialise(self, *arguments, **more)
    if self.mixed_precision == "fp16" and self.distributed_type != DistributedType.DEEPSPEED:
        # As accelerate's own initialisation does on GPUs.
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu")


def allow(patch: pytest.MonkeyPatch | None = None) -> None:
    """Let accelerate train in fp16 on the CPU, by `patch` or for as long as the process lasts."""
    (patch or pytest.MonkeyPatch()).setattr(Accelerator, "__init__", initialised)
