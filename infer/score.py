"""How well a ControlNet draws circles, beside the base model alone.

Axes: B pictures, C latent channels, h x w latent grid.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import torch
from diffusers import StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer.config import ScoreConfig
from infer.discs import Color, Measured, caption_colors, measure, outlined_disc
from infer.pipeline import (
    COMPONENTS,
    Convention,
    control_image,
    find_convention,
    find_models,
    load_controlnet,
    load_pipeline,
)
from infer.statistics import Summary, summarize
from precompute import images
from precompute.opening import open_source
from precompute.sources import Row, Source, SourceSettings
from shards.device import pick_device
from shards.errors import ConfigError
from shards.options import as_dict
from shards.provenance import write_run
from shards.sheets import contact_sheet, save_png
from shards.writer import write_text

WITH, WITHOUT = "with_controlnet", "without_controlnet"
WAYS = (WITH, WITHOUT)
NUM_WORST = 8


@dataclass(frozen=True)
class Sample:
    """A row to draw.

    Attributes:
        number: from 0.
        prompt: its caption.
        conditioning: its outline.
        color: of the disc, sRGB in 0 to 255.
        background: of the rest.
    """

    number: int
    prompt: str
    conditioning: Image.Image
    color: Color
    background: Color


@dataclass(frozen=True)
class Drawn:
    """What came of a sample, by way: with and without the ControlNet."""

    sample: Sample
    pictures: dict[str, Image.Image]
    measured: dict[str, Measured]


def score(config: ScoreConfig) -> None:
    """Draw and measure each sample both ways; write pictures, CSV, the worst, and the figures.

    Raises:
        ConfigError: the source holds something other than circles, or as `load_pipeline`.
        OSError: the output cannot be written.
    """
    source = open_source(SourceSettings(source=str(config.source)))
    rows = source.rows(range(min(config.num_samples, len(source))))
    samples = [_sample(number, row, source) for number, row in enumerate(rows)]
    base, (folder,) = find_models(config, [config.controlnet])
    convention = find_convention(config, base, folder)
    pipeline = load_pipeline(config, base, load_controlnet(folder, config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(pick_device(config.device))
    alone = StableDiffusion3Pipeline(**{name: getattr(pipeline, name) for name in COMPONENTS})
    alone.set_progress_bar_config(disable=True)
    # Circles are square.
    size = convention.size(Image.new("L", (1, 1)))
    samples = [
        replace(sample, conditioning=images.fit(sample.conditioning, size)) for sample in samples
    ]
    for folder in (*(config.output_dir / way for way in WAYS), config.json_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "score", config)
    drawn: list[Drawn] = []
    with tqdm(total=len(samples), unit="sample", desc="score", disable=None) as bar:
        for start in range(0, len(samples), config.batch_size):
            batch = samples[start : start + config.batch_size]
            for one in _draw(pipeline, alone, batch, size, convention, config):
                drawn.append(one)
                for way, picture in one.pictures.items():
                    save_png(config.output_dir / way / f"{one.sample.number:03d}.png", picture)
            bar.update(len(batch))
    figures = {way: summaries([one.measured[way] for one in drawn]) for way in WAYS}
    click.echo(table(figures))
    write_text(config.output_dir / "samples.csv", samples_csv(drawn))
    save_png(config.output_dir / "worst.png", worst_sheet(drawn))
    write_text(config.json_path, _json(config, figures))
    click.echo(f"{config.output_dir}: samples.csv, worst.png, all pictures; {config.json_path}")


def _sample(number: int, row: Row, source: Source) -> Sample:
    """Return a row ready to be drawn.

    Raises:
        ConfigError: it is no circle, or its conditioning image cannot be used.
    """
    try:
        color, background = caption_colors(str(row.prompt))
        conditioning = images.decode(source.read(number, "conditioning_image"))
        outlined_disc(conditioning)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"--source, {row.where}: {error}. score measures circles: "
            '"<colour> circle with <colour> background" and a light outline on black.'
        ) from error
    return Sample(number, str(row.prompt), conditioning, color, background)


def _draw(
    pipeline: StableDiffusion3ControlNetPipeline,
    alone: StableDiffusion3Pipeline,
    batch: Sequence[Sample],
    size: tuple[int, int],
    convention: Convention,
    config: ScoreConfig,
) -> Iterator[Drawn]:
    """Draw a batch with and without the ControlNet, from the same noise.

    The pipeline samples conditioning latents from the global generator, so that figures depend a
    little on how the samples are batched.
    """
    common: dict[str, Any] = {
        "prompt": [sample.prompt for sample in batch],
        "negative_prompt": [config.negative_prompt] * len(batch),
        "width": size[0],
        "height": size[1],
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": convention.max_sequence_length,
        "latents": noise(pipeline, batch, size, config.seed),
    }
    torch.manual_seed(config.seed + batch[0].number)
    controlled = pipeline(
        control_image=control_image([sample.conditioning for sample in batch], convention),
        controlnet_conditioning_scale=config.controlnet_conditioning_scale,
        **common,
    ).images
    free = alone(**common).images
    for sample, *both in zip(batch, controlled, free, strict=True):
        pictures = dict(zip(WAYS, both, strict=True))
        measured = {
            way: measure(picture, sample.conditioning, sample.color, sample.background)
            for way, picture in pictures.items()
        }
        yield Drawn(sample, pictures, measured)


def noise(
    pipeline: StableDiffusion3ControlNetPipeline,
    batch: Sequence[Sample],
    size: tuple[int, int],
    seed: int,
) -> Tensor:
    """Return the noise each picture starts from, [B, C, h, w], the same in any batch."""
    width, height = (side // pipeline.vae_scale_factor for side in size)
    shape = (1, pipeline.transformer.config.in_channels, height, width)
    noises = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sample.number))
        for sample in batch
    ]
    return torch.cat(noises).to(pipeline.device, pipeline.transformer.dtype)


def summaries(measured: Sequence[Measured]) -> dict[str, Summary]:
    """Return the summary of each measurement; a disc's colour only where a disc was found."""
    return {
        "iou": summarize([one.iou for one in measured]),
        "disc_color_error": summarize(
            [one.color_error for one in measured if one.color_error is not None]
        ),
        "background_color_error": summarize([one.background_error for one in measured]),
    }


def samples_csv(drawn: Sequence[Drawn]) -> str:
    """Return a line for each sample; a colour error is empty where no disc was found."""
    measures = ("iou", "color_error", "background_error")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["sample", "prompt", *(f"{way}_{measure}" for way in WAYS for measure in measures)]
    )
    for one in drawn:
        figures = [getattr(one.measured[way], measure) for way in WAYS for measure in measures]
        rounded = ["" if value is None else f"{value:.4f}" for value in figures]
        writer.writerow([one.sample.number, one.sample.prompt, *rounded])
    return text.getvalue()


def worst_sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """Return the samples of the lowest IoU with the ControlNet, the lowest first."""
    worst = sorted(drawn, key=lambda one: one.measured[WITH].iou)[:NUM_WORST]
    rows = [
        (
            [one.sample.conditioning, *(one.pictures[way] for way in WAYS)],
            f"{one.sample.number}: IoU {one.measured[WITH].iou:.2f}, {one.sample.prompt}",
        )
        for one in worst
    ]
    return contact_sheet(rows, ["conditioning", "with ControlNet", "without"])


def table(figures: dict[str, dict[str, Summary]]) -> str:
    """Return the figures as text: mean, its 95 % interval, median."""
    lines = []
    for way, found in figures.items():
        discs = f"{found['disc_color_error'].count} of {found['iou'].count}"
        lines += [
            f"{way.replace('_controlnet', ' ControlNet')} (discs found: {discs})",
            f"  IoU                        {found['iou']}",
            f"  disc colour, CIEDE2000     {found['disc_color_error']}",
            f"  background, CIEDE2000      {found['background_color_error']}",
        ]
    return "\n".join(lines)


def _json(config: ScoreConfig, figures: dict[str, dict[str, Summary]]) -> str:
    plain = {
        way: {name: asdict(summary) for name, summary in found.items()}
        for way, found in figures.items()
    }
    return json.dumps({"config": as_dict(config), **plain}, ensure_ascii=False, indent=1) + "\n"
