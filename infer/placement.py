"""Which models are on the device, and when."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from shards.errors import ConfigError

Placement = Literal["none", "model", "sequential"]
# What pictures themselves take, decoding at 1024 px included.
WORKING_BYTES = 5_000_000_000


def choose(sizes: Mapping[str, int], free: int) -> Placement:
    """Return how models go where this much memory is free.

    Args:
        sizes: bytes of each model.
        free: bytes.
    """
    if sum(sizes.values()) + WORKING_BYTES <= free:
        return "none"
    # Some visit in turn, but the ControlNet and the transformer work together.
    together = sizes.get("transformer", 0) + sizes.get("controlnet", 0)
    if max([together, *sizes.values()]) + WORKING_BYTES <= free:
        return "model"
    return "sequential"


def place(pipeline: Any, wanted: str, device: torch.device) -> None:
    """Bring a pipeline's models to a device as is asked for.

    Raises:
        ConfigError: there is no device to bring them to.
    """
    if wanted == "auto":
        wanted = "none"
        if device.type == "cuda":
            sizes = {
                name: sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
                for name, model in pipeline.components.items()
                if isinstance(model, torch.nn.Module)
            }
            wanted = choose(sizes, torch.cuda.mem_get_info(device)[0])
    if wanted == "none":
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise ConfigError(f"--offload {wanted}: the CPU is where models are offloaded to.")
    if wanted == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
