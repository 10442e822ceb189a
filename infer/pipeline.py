"""The stock pipeline with a ControlNet in it, and how that ControlNet wants to be driven.

Axes: B pictures, 3 colours, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image
from torch import Tensor

from infer.config import PipelineConfig
from precompute import images
from shards.device import keep_freed_memory, pick_device
from shards.errors import ConfigError
from shards.pretrained import (
    DATA_KEY,
    controlnet_mismatches,
    find_base,
    find_controlnet,
    read_config,
)

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
# The stock pipeline's own defaults, for a ControlNet that says nothing of its data.
STOCK_MAX_SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Convention:
    """How a ControlNet's training data was made, so that inference does the same.

    Attributes:
        resolution_px: side of the pictures.
        max_sequence_length: T5 tokens.
        pixel_range: of conditioning images before the VAE; `-1_1` is the stock pipeline's.
    """

    resolution_px: int
    max_sequence_length: int
    pixel_range: str


def load_pipeline(config: PipelineConfig) -> StableDiffusion3ControlNetPipeline:
    """Return the stock pipeline with the ControlNet in it, on the device.

    Raises:
        ConfigError: one of them cannot be found, or their widths differ.
    """
    base = find_base(
        config.pretrained_model_name_or_path,
        COMPONENTS,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    dtype = getattr(torch, config.dtype)
    folder = find_controlnet(config.controlnet, "--controlnet", cache_dir=config.cache_dir)
    controlnet = SD3ControlNetModel.from_pretrained(folder, dtype=dtype)
    wrong = controlnet_mismatches(controlnet.config, read_config(base, "transformer"))
    if wrong:
        listing = "\n".join(wrong)
        raise ConfigError(
            f"--controlnet {config.controlnet} was not trained for "
            f"{config.pretrained_model_name_or_path}:\n{listing}"
        )
    device = pick_device(config.device)
    keep_freed_memory(device)
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=controlnet, dtype=dtype, variant=config.variant
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_convention(
    config: PipelineConfig, pipeline: StableDiffusion3ControlNetPipeline
) -> Convention:
    """Return what the options, else the ControlNet's own configuration, else the base model say."""
    data = pipeline.controlnet.config.get(DATA_KEY) or {}
    native = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return Convention(
        resolution_px=config.resolution or int(data.get("height", native)),
        max_sequence_length=config.max_sequence_length
        or int(data.get("max_sequence_length", STOCK_MAX_SEQUENCE_LENGTH)),
        pixel_range=str(data.get("conditioning_range", "-1_1")),
    )


def control_image(
    conditioning: Sequence[Image.Image], convention: Convention
) -> list[Image.Image] | Tensor:
    """Return conditioning images as the pipeline is to get them, in the ControlNet's range."""
    if convention.pixel_range == "-1_1":
        return list(conditioning)
    # The pipeline passes a tensor on as it is.
    uint8 = torch.stack([images.to_uint8(image) for image in conditioning])
    return images.to_pixels(uint8, convention.pixel_range)
