"""The stock pipeline with ControlNets in it, and how each wants to be driven.

Axes: B pictures, 3 colours, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from PIL import Image
from torch import Tensor

from common.device import compile_blocks, keep_freed_memory, pick_device
from common.errors import ConfigError, RunError
from infer.config import PipelineConfig
from infer.placement import forget_models, place
from sd3 import images
from sd3.buckets import nearest_buckets
from sd3.pretrained import (
    DATA_KEY,
    controlnet_mismatches,
    find_base,
    find_controlnet,
    read_config,
)
from sd3.quantized import quantize

COMPONENTS = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)
TEXT_COMPONENTS = COMPONENTS[3:]
# The stock pipeline's own defaults, for a ControlNet that says nothing of its data.
STOCK_MAX_SEQUENCE_LENGTH = 256
# diffusers' script trains with pixels in this range and this many tokens, with the pooled embedding
# and the VAE's shift, and says none of it in the configuration that it saves.
SCRIPT_PIXEL_RANGE, SCRIPT_MAX_SEQUENCE_LENGTH = "0_1", 77


@dataclass(frozen=True)
class Convention:
    """How a ControlNet's training data was made, so that inference does the same.

    Attributes:
        sizes: (width, height) in pixels that pictures may have, from tall to wide; the one whose
            shape is nearest the conditioning image's is taken.
        max_sequence_length: T5 tokens.
        pixel_range: of conditioning images before the VAE; `-1_1` is the stock pipeline's.
    """

    sizes: tuple[tuple[int, int], ...]
    max_sequence_length: int
    pixel_range: str

    def size(self, image: Image.Image) -> tuple[int, int]:
        """Return width and height of the picture that a conditioning image asks for."""
        wanted = np.array([image.size], np.int32)
        return self.sizes[int(nearest_buckets(wanted, list(self.sizes))[0])]


def find_models(
    config: PipelineConfig, controlnets: Sequence[str], components: Sequence[str] = COMPONENTS
) -> tuple[Path, list[Path]]:
    """Return the folders of the base and of ControlNets that fit it, before any is loaded.

    Raises:
        ConfigError: one cannot be found, or the widths of a ControlNet differ from the base's.
    """
    base = find_base(
        config.pretrained_model_name_or_path,
        components,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    transformer = read_config(base, "transformer")
    folders = []
    for name in controlnets:
        folder = find_controlnet(name, "--controlnet", cache_dir=config.cache_dir)
        if wrong := controlnet_mismatches(read_config(folder, ""), transformer):
            listing = "\n".join(wrong)
            raise ConfigError(
                f"--controlnet {name} was not trained for "
                f"{config.pretrained_model_name_or_path}:\n{listing}"
            )
        folders.append(folder)
    return base, folders


def titles_of(names: Sequence[str]) -> list[str]:
    """Return a short name for each ControlNet: the end of its own, as long as tells it apart.

    Those of a run's checkpoints are `checkpoint-500`, not the `controlnet` in it.
    """
    parts = [[part for part in name.replace("\\", "/").split("/") if part] for name in names]
    parts = [one[:-1] if one[-1:] == ["controlnet"] and one[:-1] else one for one in parts]
    for count in range(1, max(map(len, parts)) + 1):
        titles = ["-".join(one[-count:]) for one in parts]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{number}-{'-'.join(one[-1:])}" for number, one in enumerate(parts)]


def load_controlnet(folder: Path, config: PipelineConfig) -> SD3ControlNetModel:
    """Return a ControlNet, told what diffusers' script leaves out where it is one of its own."""
    controlnet = SD3ControlNetModel.from_pretrained(folder, dtype=getattr(torch, config.dtype))
    if config.convention == "train_controlnet_sd3":
        controlnet.register_to_config(force_zeros_for_pooled_projection=False)
    return controlnet


def load_pipeline(
    config: PipelineConfig, base: Path, folders: Sequence[Path], *, encodes: bool = True
) -> StableDiffusion3ControlNetPipeline:
    """Return the stock pipeline with ControlNets in it, where it is to compute.

    Args:
        config: of the run.
        base: folder of the base model.
        folders: of the ControlNet, or of several that draw together.
        encodes: whether text encoders are needed.
    """
    device = pick_device(config.device)
    keep_freed_memory(device)
    forget_models(device)
    nets = [load_controlnet(folder, config) for folder in folders]
    absent = {} if encodes else dict.fromkeys(TEXT_COMPONENTS)
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base,
        controlnet=nets[0] if len(nets) == 1 else SD3MultiControlNetModel(nets),
        dtype=getattr(torch, config.dtype),
        variant=config.variant,
        **absent,
    )
    if config.shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, shift=config.shift
        )
    if config.quantize_base is not None:
        quantize(pipeline.transformer.requires_grad_(False), config.quantize_base)
    if config.vae_tiling:
        pipeline.vae.enable_tiling()
    if config.compile:
        compile_blocks(pipeline.transformer, *nets)
    place(
        pipeline,
        config.offload,
        device,
        pictures=getattr(config, "batch_size", 1),
        quantization=config.quantize_base,
    )
    return pipeline


def out_of_memory(error: torch.OutOfMemoryError) -> RunError:
    """Return an error that says what would help."""
    return RunError(
        f"out of memory: {str(error).splitlines()[0]} Finished pictures are kept. What helps: a "
        "smaller --batch-size, --dtype bfloat16, --offload model or sequential, --quantize-base "
        "int8, --vae-tiling, and for generate --cache, where it knows the prompts."
    )


def find_convention(config: PipelineConfig, base: Path, controlnet: Path) -> Convention:
    """Return what the options, else the ControlNet's own configuration, else the base model say."""
    data = read_config(controlnet, "").get(DATA_KEY) or {}
    tokens = int(data.get("max_sequence_length", STOCK_MAX_SEQUENCE_LENGTH))
    pixel_range = str(data.get("conditioning_range", "-1_1"))
    if config.convention == "train_controlnet_sd3":
        tokens, pixel_range = SCRIPT_MAX_SEQUENCE_LENGTH, SCRIPT_PIXEL_RANGE
    return Convention(
        sizes=_sizes(config, base, data),
        max_sequence_length=config.max_sequence_length or tokens,
        pixel_range=pixel_range,
    )


def _sizes(config: PipelineConfig, base: Path, data: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    if config.height is not None and config.width is not None:
        return ((config.width, config.height),)
    if config.resolution is not None:
        return ((config.resolution, config.resolution),)
    if buckets := data.get("buckets"):
        return tuple(
            sorted(((wide, high) for high, wide in buckets), key=lambda one: one[0] / one[1])
        )
    if "height" in data and "width" in data:
        return ((int(data["width"]), int(data["height"])),)
    vae = read_config(base, "vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    native = int(read_config(base, "transformer")["sample_size"]) * factor
    return ((native, native),)


def control_image(
    conditioning: Sequence[Image.Image], convention: Convention
) -> list[Image.Image] | Tensor:
    """Return conditioning images as the pipeline is to get them, in the ControlNet's range."""
    if convention.pixel_range == "-1_1":
        return list(conditioning)
    # The pipeline passes a tensor on as it is.
    uint8 = torch.stack([images.to_uint8(image) for image in conditioning])
    return images.to_pixels(uint8, convention.pixel_range)
