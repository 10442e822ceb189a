"""How each ControlNet's training data was made, so that inference does the same.

Axes: B pictures, 3 colours, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infer.config import PipelineConfig
from sd3.buckets import nearest_buckets
from sd3.pixels import to_pixels, to_uint8
from sd3.pretrained import DATA_KEY, read_config

# The stock pipeline's own default, for a ControlNet whose configuration says nothing of its data.
STOCK_MAX_SEQUENCE_LENGTH = 256
# diffusers' script trains with pixels in this range and this many tokens, with the pooled embedding
# and the VAE's shift. The configuration that it saves mentions none of them.
SCRIPT_PIXEL_RANGE, SCRIPT_MAX_SEQUENCE_LENGTH = "0_1", 77


@dataclass(frozen=True)
class Convention:
    """How a ControlNet's training data was made.

    Attributes:
        sizes: (width, height) in pixels that pictures may have, from tall to wide; inference takes
            the one whose shape is nearest the conditioning image's.
        max_sequence_length: T5 tokens.
        pixel_range: range of conditioning images before the VAE; `-1_1` is the stock pipeline's.
    """

    sizes: tuple[tuple[int, int], ...]
    max_sequence_length: int
    pixel_range: str

    def picture_size(self, conditioning: Image.Image) -> tuple[int, int]:
        """Return width and height of the picture for a conditioning image."""
        size = np.array([conditioning.size], np.int32)
        return self.sizes[int(nearest_buckets(size, list(self.sizes))[0])]


def find_convention(config: PipelineConfig, base: Path, controlnet: Path) -> Convention:
    """Return a ControlNet's convention.

    The settings win over the ControlNet's configuration, which wins over the base model's.

    Args:
        config: settings of the run.
        base: folder of the base model.
        controlnet: folder of the ControlNet.
    """
    data = read_config(controlnet, "").get(DATA_KEY) or {}
    tokens = int(data.get("max_sequence_length", STOCK_MAX_SEQUENCE_LENGTH))
    pixel_range = str(data.get("conditioning_range", "-1_1"))
    if config.convention == "train_controlnet_sd3":
        tokens, pixel_range = SCRIPT_MAX_SEQUENCE_LENGTH, SCRIPT_PIXEL_RANGE
    return Convention(
        sizes=_find_sizes(config, base, data),
        max_sequence_length=config.max_sequence_length or tokens,
        pixel_range=pixel_range,
    )


def _find_sizes(
    config: PipelineConfig, base: Path, data: dict[str, Any]
) -> tuple[tuple[int, int], ...]:
    if config.height is not None and config.width is not None:
        return ((config.width, config.height),)
    if config.resolution is not None:
        return ((config.resolution, config.resolution),)
    if buckets := data.get("buckets"):
        sizes = [(width, height) for height, width in buckets]
        return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))
    if "height" in data and "width" in data:
        return ((int(data["width"]), int(data["height"])),)
    vae = read_config(base, "vae")
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    native = int(read_config(base, "transformer")["sample_size"]) * factor
    return ((native, native),)


def prepare_control_image(
    conditioning: Sequence[Image.Image], convention: Convention
) -> list[Image.Image] | Tensor:
    """Return the pipeline's `control_image`, in the pixel range of the ControlNet.

    Args:
        conditioning: RGB images of the pictures' size, one for each picture of the batch.
        convention: the ControlNet's.

    Returns:
        The images, or pixels [B, 3, H, W] where the range is not the stock pipeline's.
    """
    if convention.pixel_range == "-1_1":
        return list(conditioning)
    # The pipeline does not scale a tensor.
    uint8 = torch.stack([to_uint8(image) for image in conditioning])
    return to_pixels(uint8, convention.pixel_range)
