"""Drawing pictures with the stock StableDiffusion3ControlNetPipeline.

Axes: 3 colours, H x W pixels.
"""

from dataclasses import dataclass
from typing import Any

import click
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer.config import GenerateConfig
from infer.sheets import contact_sheet
from precompute import images
from precompute.images import BadImage
from shards.device import pick_device
from shards.errors import ConfigError
from shards.pretrained import (
    DATA_KEY,
    controlnet_mismatches,
    find_base,
    find_controlnet,
    read_config,
)
from shards.provenance import write_run
from shards.writer import atomic_file

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


def generate(config: GenerateConfig) -> None:
    """Draw each pair as a PNG, then a contact sheet of all.

    Raises:
        ConfigError: an image cannot be read, or base model and ControlNet do not go together.
        OSError: the output cannot be written; finished pictures are kept.
    """
    pairs = [(prompt, path, _load(path)) for prompt, path in config.pairs()]
    pipeline = load_pipeline(config)
    convention = find_convention(config, pipeline)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "infer", config)
    rows = []
    for number, (prompt, _, image) in enumerate(tqdm(pairs, unit="picture", disable=None)):
        conditioning = images.fit(image, convention.resolution_px)
        picture = draw(pipeline, prompt, conditioning, convention, config)
        _save(picture, config, f"{number:03d}.png")
        rows.append(([conditioning, picture], prompt))
        click.echo(config.output_dir / f"{number:03d}.png")
    _save(contact_sheet(rows, ["conditioning", "result"]), config, "contact_sheet.png")
    click.echo(config.output_dir / "contact_sheet.png")


def load_pipeline(config: GenerateConfig) -> StableDiffusion3ControlNetPipeline:
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
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=controlnet, dtype=dtype, variant=config.variant
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def find_convention(
    config: GenerateConfig, pipeline: StableDiffusion3ControlNetPipeline
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


def draw(
    pipeline: StableDiffusion3ControlNetPipeline,
    prompt: str,
    conditioning: Image.Image,
    convention: Convention,
    config: GenerateConfig,
) -> Image.Image:
    """Return one picture.

    The global generator is seeded and passed on, as diffusers' own examples do: the pipeline
    samples the conditioning latent from it first, then the noise.
    """
    control: Image.Image | Tensor = conditioning
    if convention.pixel_range != "-1_1":
        # The pipeline passes a tensor on as it is.
        control = images.to_pixels(images.to_uint8(conditioning), convention.pixel_range)[None]
    result: Any = pipeline(
        prompt,
        negative_prompt=config.negative_prompt,
        control_image=control,
        height=convention.resolution_px,
        width=convention.resolution_px,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        controlnet_conditioning_scale=config.controlnet_conditioning_scale,
        max_sequence_length=convention.max_sequence_length,
        generator=torch.manual_seed(config.seed),
    )
    picture: Image.Image = result.images[0]
    return picture


def _load(path: Any) -> Image.Image:
    try:
        return images.load(path)[0]
    except BadImage as error:
        raise ConfigError(f"--image {path}: {error}.") from error


def _save(picture: Image.Image, config: GenerateConfig, name: str) -> None:
    with atomic_file(config.output_dir / name) as file:
        picture.save(file, format="PNG")
