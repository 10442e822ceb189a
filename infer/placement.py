"""Placement of a pipeline's models: on the device for good, or offloaded to host memory."""

import gc
from collections.abc import Mapping
from typing import Any, Literal

import torch

from common.errors import ConfigError

Placement = Literal["none", "model", "sequential"]
# Activations of one picture, decoding at 1024 px included.
WORKING_BYTES = 5_000_000_000
# bitsandbytes packs NF4 weights as they move to the device: half a byte each and scales, not two.
NF4_SHARE = 0.28


def choose_placement(
    sizes: Mapping[str, int], free: int, *, batch_size: int = 1, quantized: bool = False
) -> Placement:
    """Return the fastest placement that fits into the free memory.

    Args:
        sizes: bytes of each model.
        free: bytes of free device memory.
        batch_size: pictures drawn at a time.
        quantized: whether the transformer is quantized; it cannot be offloaded by layers then.
    """
    working = WORKING_BYTES * batch_size
    if sum(sizes.values()) + working <= free:
        return "none"
    # Model offloading loads one model at a time, but a step needs ControlNet and transformer.
    together = sizes.get("transformer", 0) + sizes.get("controlnet", 0)
    if quantized or max([together, *sizes.values()]) + working <= free:
        return "model"
    return "sequential"


def free_memory(device: torch.device) -> None:
    """Free the memory of models that are no longer used; their offload hooks form cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def place(
    pipeline: Any, offload: str, device: torch.device, *, batch_size: int, quantization: str | None
) -> None:
    """Move a pipeline's models to a device, or set up their offloading.

    Args:
        pipeline: pipeline with all models in host memory.
        offload: `none`, `model`, `sequential`, or `auto` for what fits.
        device: device to compute on.
        batch_size: pictures drawn at a time.
        quantization: number format of the quantized transformer, or None.

    Raises:
        ConfigError: offloading is asked for on a CPU.
    """
    if offload == "auto":
        offload = "none"
        if device.type == "cuda":
            sizes = {
                name: sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
                for name, model in pipeline.components.items()
                if isinstance(model, torch.nn.Module)
            }
            if quantization == "nf4":
                sizes["transformer"] = int(NF4_SHARE * sizes["transformer"])
            free = torch.cuda.mem_get_info(device)[0]
            offload = choose_placement(
                sizes, free, batch_size=batch_size, quantized=quantization is not None
            )
    if offload == "none":
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise ConfigError(f"--offload {offload}: the CPU is where models are offloaded to.")
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
