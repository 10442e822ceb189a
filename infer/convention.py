"""How each ControlNet's training data was made, so that inference does the same.

Axes: B pictures, 3 colours, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import torch
from PIL import Image

from common.errors import ConfigError
from infer.config import PipelineConfig
from sd3.base.without_t5 import uses_t5
from sd3.buckets import nearest_buckets
from sd3.controlnet.unsaved_convention import corrected
from sd3.images import BACKGROUND
from sd3.inpainting import is_inpainting, mask_of
from sd3.pixels import to_pixels, to_uint8
from sd3.pretrained import DATA_KEY, largest_side, read_config, vae_factor
from sd3.value_scale import AS_IS
from shards.format.specs import AnnotatorSpec, describe_annotator

Sizes = tuple[tuple[int, int], ...]  # width and height in pixels

# The stock pipeline's own default, for a ControlNet whose configuration says nothing of its data.
STOCK_MAX_SEQUENCE_LENGTH = 256


@dataclass(frozen=True)
class Convention:
    """How a ControlNet's training data was made.

    Attributes:
        sizes: (width, height) in pixels that pictures may have, from tall to wide; inference takes
            the one whose shape is nearest the conditioning image's.
        max_sequence_length: T5 tokens.
        pixel_range: range of conditioning images before the VAE; `-1_1` is the stock pipeline's.
        background: colour behind transparent pixels of conditioning images, for Pillow.
        scale: which of their numbers become black and white; see `sd3.value_scale`.
        annotator: what drew the conditioning images; None if they came with the data, or if its
            configuration does not say.
        inpainting: whether a control is a picture without the part that is drawn anew, in RGBA;
            see `sd3.inpainting`.
    """

    sizes: Sizes
    max_sequence_length: int
    pixel_range: str
    background: str = BACKGROUND
    scale: str = AS_IS
    annotator: AnnotatorSpec | None = None
    mixed: tuple[str, ...] = ()
    inpainting: bool = False

    def picture_size(self, conditioning: Image.Image) -> tuple[int, int]:
        """Return width and height of the picture for a conditioning image."""
        size = np.array([conditioning.size], np.int32)
        return self.sizes[int(nearest_buckets(size, list(self.sizes))[0])]


def find_convention(config: PipelineConfig, base: Path, name: str, controlnet: Path) -> Convention:
    """Return a ControlNet's convention; say where the settings differ from its training.

    Args and errors: as of `read_convention`.
    """
    found = read_convention(config, base, name, controlnet)
    data = read_config(controlnet, "").get(DATA_KEY) or {}
    differences = _differences(found, _trained_sizes(data), data.get("max_sequence_length"))
    with_t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
    if data and getattr(config, "cache", None) is None:  # a cache's prompts are what they are
        trained_with = data.get("t5", True)
        if with_t5 and not trained_with:
            differences.append("trained without T5; --no-t5 draws so")
        elif trained_with and not with_t5 and not data.get("dropout_t5"):
            differences.append("trained with T5, and these prompts are encoded without it")
    if differences:
        click.echo(f"{name}: {'; '.join(differences)}.", err=True)
    return found


def read_convention(config: PipelineConfig, base: Path, name: str, controlnet: Path) -> Convention:
    """Return a ControlNet's convention.

    The settings win over the ControlNet's configuration, which wins over the base model's.

    Args:
        config: settings of the run.
        base: folder of the base model.
        name: folder or hub id of the ControlNet, as the user gave it.
        controlnet: folder of the ControlNet.

    Raises:
        ConfigError: the base or the ControlNet has no positions for pictures so large.
    """
    saved = corrected(read_config(controlnet, ""), config.convention)
    data = saved.get(DATA_KEY) or {}
    tokens = int(data.get("max_sequence_length", STOCK_MAX_SEQUENCE_LENGTH))
    pixel_range = str(data.get("conditioning_range", "-1_1"))
    found = Convention(
        sizes=given_sizes(config) or _trained_sizes(data) or native_sizes(base),
        max_sequence_length=config.max_sequence_length or tokens,
        pixel_range=pixel_range,
        background=_background(data),
        scale=str(data.get("conditioning_scale", AS_IS)),
        annotator=_annotator(name, data),
        mixed=_mixed(data),
        inpainting=is_inpainting(saved),
    )
    check_positions(found.sizes, base, saved)
    return found


def _mixed(data: dict[str, Any]) -> tuple[str, ...]:
    """Return the controls that were mixed, each with what drew it, as far as it is said."""
    listed = data.get("mixed")
    found = []
    for entry in listed if isinstance(listed, list) else []:
        drawn = entry.get("annotator")
        by = f" ({describe_annotator(drawn['name'], drawn['arguments'])})" if drawn else ""
        found.append(f"{entry.get('control')}{by}")
    return tuple(dict.fromkeys(found))


def _annotator(name: str, data: dict[str, Any]) -> AnnotatorSpec | None:
    """Return what drew a ControlNet's controls, if it says so.

    Raises:
        ConfigError: what it says makes no sense.
    """
    entry = data.get("annotator")
    if entry is None:
        return None
    try:
        return msgspec.convert(entry, AnnotatorSpec)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--controlnet {name}: annotator in its config.json: {error}.") from error


def _background(data: dict[str, Any]) -> str:
    if "background" not in data:
        return BACKGROUND
    red, green, blue = data["background"]
    return f"#{red:02x}{green:02x}{blue:02x}"


def given_sizes(config: PipelineConfig) -> Sizes:
    """Return the size that the settings name, or nothing."""
    if config.height is not None and config.width is not None:
        return ((config.width, config.height),)
    return () if config.resolution is None else ((config.resolution, config.resolution),)


def _trained_sizes(data: dict[str, Any]) -> Sizes:
    """Return the sizes that a ControlNet was trained on, from tall to wide, if it says so."""
    if buckets := data.get("buckets"):
        sizes = [(width, height) for height, width in buckets]
        return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))
    if "height" in data and "width" in data:
        return ((int(data["width"]), int(data["height"])),)
    return ()


def native_sizes(base: Path) -> Sizes:
    """Return the size that a base model was made for."""
    native = int(read_config(base, "transformer")["sample_size"]) * vae_factor(base)
    return ((native, native),)


def check_positions(sizes: Sizes, base: Path, controlnet: dict[str, Any]) -> None:
    """Check that base model and ControlNet have positions for pictures of these sizes.

    Raises:
        ConfigError: one has not.
    """
    networks = {"base": read_config(base, "transformer")}
    if controlnet.get("use_pos_embed", True):
        networks["ControlNet"] = controlnet
    for name, network in networks.items():
        largest = largest_side(network) * vae_factor(base)
        for width, height in sizes:
            if max(width, height) > largest:
                raise ConfigError(
                    f"{width} x {height} px: the {name} has positions for {largest} px a side "
                    "at most; give --resolution, or --height and --width."
                )


def _differences(found: Convention, trained: Sizes, tokens: int | None) -> list[str]:
    """Return what differs from a ControlNet's training, in words.

    Args:
        found: its convention in this run.
        trained: sizes of its training; empty if unknown.
        tokens: T5 tokens of its training; None if unknown.
    """
    differences = []
    if trained and not set(found.sizes) <= set(trained):
        ends = " to ".join(f"{width} x {height}" for width, height in (trained[0], trained[-1]))
        one = "{} x {}".format(*trained[0])
        were = one if len(trained) == 1 else f"{len(trained)} sizes, {ends}"
        now = "{} x {}".format(*found.sizes[0])
        differences.append(f"trained on pictures of {were} px, and these have {now} px")
    if tokens is not None and tokens != found.max_sequence_length:
        differences.append(
            f"trained with {tokens} T5 tokens, and these have {found.max_sequence_length}"
        )
    return differences


def control_arguments(
    conditioning: Sequence[Image.Image], convention: Convention
) -> dict[str, Any]:
    """Return the pipeline's arguments for a control, in the pixel range of the ControlNet.

    Args:
        conditioning: RGB images of the pictures' size, one for each picture of the batch; for
            inpainting RGBA.
        convention: the ControlNet's.

    Returns:
        `control_image`: the images, or pixels [B, 3, H, W] where the range is not the stock
        pipeline's; for inpainting also `control_mask`.
    """
    if convention.inpainting:
        return {
            "control_image": [image.convert("RGB") for image in conditioning],
            "control_mask": [mask_of(image) for image in conditioning],
        }
    if convention.pixel_range == "-1_1":
        return {"control_image": list(conditioning)}
    # The pipeline does not scale a tensor.
    uint8 = torch.stack([to_uint8(image) for image in conditioning])
    return {"control_image": to_pixels(uint8, convention.pixel_range)}
