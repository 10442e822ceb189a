"""How several processes share the ControlNet: whole copies (DDP), FSDP2, or DeepSpeed ZeRO.

accelerate shards its weights, gradients and optimiser state as its configuration says (see
configs/accelerate/). The frozen transformer is whole on every device.
"""

from typing import Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType

Strategy = Literal["copies", "fsdp", "deepspeed"]
STRATEGIES: dict[DistributedType, Strategy] = {
    DistributedType.NO: "copies",
    DistributedType.MULTI_CPU: "copies",
    DistributedType.MULTI_GPU: "copies",
    DistributedType.FSDP: "fsdp",
    DistributedType.DEEPSPEED: "deepspeed",
}
STRATEGY_NAMES: dict[Strategy, str] = {
    "copies": "one process or DDP",
    "fsdp": "FSDP2",
    "deepspeed": "DeepSpeed",
}


def strategy(accelerator: Accelerator) -> Strategy:
    """Return how the processes share the ControlNet."""
    return STRATEGIES[accelerator.distributed_type]


def keeps_gradients(accelerator: Accelerator) -> bool:
    """Return whether gradients are set to zero between steps instead of being freed.

    DDP's gradients are views of the memory that it sends. If they were freed, the batches that are
    accumulated before anything is sent would get gradients of their own beside that memory.
    """
    ddp = strategy(accelerator) == "copies" and accelerator.num_processes > 1
    return ddp and accelerator.gradient_accumulation_steps > 1
