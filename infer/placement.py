"""Which models are on the device, and when."""

import gc
from collections.abc import Mapping
from typing import Any, Literal

import torch

from common.errors import ConfigError

Placement = Literal["none", "model", "sequential"]
# What a picture itself takes, decoding at 1024 px included.
WORKING_BYTES = 5_000_000_000
# NF4 packs its weights on the way to the device: half a byte each and scales, instead of two.
NF4_SHARE = 0.28


def choose(
    sizes: Mapping[str, int], free: int, *, pictures: int = 1, quantized: bool = False
) -> Placement:
    """Return how models go where this much memory is free.

    Args:
        sizes: bytes of each model.
        free: bytes.
        pictures: drawn at a time.
        quantized: whether the transformer is; it cannot go layer by layer then.
    """
    working = WORKING_BYTES * pictures
    if sum(sizes.values()) + working <= free:
        return "none"
    # Some visit in turn, but the ControlNet and the transformer work together.
    together = sizes.get("transformer", 0) + sizes.get("controlnet", 0)
    if quantized or max([together, *sizes.values()]) + working <= free:
        return "model"
    return "sequential"


def forget_models(device: torch.device) -> None:
    """Give the memory of models that nobody holds any more back; hooks hold on to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def place(
    pipeline: Any, wanted: str, device: torch.device, *, pictures: int, quantization: str | None
) -> None:
    """Bring a pipeline's models to a device as is asked for.

    Args:
        pipeline: in host memory.
        wanted: see `PipelineConfig.offload`.
        device: to compute on.
        pictures: drawn at a time.
        quantization: of the transformer.

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
            if quantization == "nf4":
                sizes["transformer"] = int(NF4_SHARE * sizes["transformer"])
            free = torch.cuda.mem_get_info(device)[0]
            wanted = choose(sizes, free, pictures=pictures, quantized=quantization is not None)
    if wanted == "none":
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise ConfigError(f"--offload {wanted}: the CPU is where models are offloaded to.")
    if wanted == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)
