"""Drawing one picture after the other with the stock StableDiffusion3ControlNetPipeline."""

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from diffusers import StableDiffusion3ControlNetPipeline
from PIL import Image
from tqdm import tqdm

from infer.config import GenerateConfig
from infer.pipeline import Convention, control_image, find_convention, load_pipeline
from precompute import images
from precompute.images import BadImage
from shards.errors import ConfigError
from shards.provenance import write_run
from shards.sheets import contact_sheet, save_png


def generate(config: GenerateConfig) -> None:
    """Draw each pair as a PNG, then a contact sheet of all.

    Raises:
        ConfigError: an image cannot be read, or base model and ControlNet do not go together.
        OSError: the output cannot be written; finished pictures are kept.
    """
    loaded = [(prompt, path, _load(path)) for prompt, path in config.pairs()]
    pipeline = load_pipeline(config)
    convention = find_convention(config, pipeline)
    pairs = [
        (prompt, _checked(path, partial(images.fit, image, convention.resolution_px)))
        for prompt, path, image in loaded
    ]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "infer", config)
    rows = []
    for number, (prompt, conditioning) in enumerate(tqdm(pairs, unit="picture", disable=None)):
        picture = draw(pipeline, prompt, conditioning, convention, config)
        path = config.output_dir / f"{number:03d}.png"
        save_png(path, picture)
        rows.append(([conditioning, picture], prompt))
        click.echo(path)
    sheet = config.output_dir / "contact_sheet.png"
    save_png(sheet, contact_sheet(rows, ["conditioning", "result"]))
    click.echo(sheet)


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
    result: Any = pipeline(
        prompt,
        negative_prompt=config.negative_prompt,
        control_image=control_image([conditioning], convention),
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
    return _checked(path, lambda: images.load(path)[0])


def _checked(path: Any, prepare: Callable[[], Image.Image]) -> Image.Image:
    try:
        return prepare()
    except BadImage as error:
        raise ConfigError(f"--image {path}: {error}.") from error
