"""How well ControlNets do, side by side and beside the base model alone.

Axes: B pictures, C latent channels, h x w latent grid.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.atomic_files import atomic_file, write_text
from common.errors import ConfigError
from common.options import as_dict
from common.provenance import write_run
from infer.config import ScoreConfig
from infer.pipeline import (
    COMPONENTS,
    Convention,
    control_image,
    find_convention,
    find_models,
    load_pipeline,
    out_of_memory,
    titles_of,
)
from infer.scoring.measures import MEASURES, Measure, Sample, Values, fitting
from infer.scoring.statistics import Summary, summarize
from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings
from sd3 import images
from sd3.contact_sheet import contact_sheet, save_png, thumbnail

# What draws: the ControlNet, or each of several by its title; and the base model alone.
WITH, WITHOUT = "with_controlnet", "without_controlnet"
NUM_WORST = 8
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Drawn:
    """What came of a sample.

    Attributes:
        sample: drawn.
        pictures: files, by what drew them.
        measured: figures, likewise.
    """

    sample: Sample
    pictures: dict[str, Path]
    measured: dict[str, Values]


def score(config: ScoreConfig) -> None:
    """Draw and measure each sample each way; write pictures, CSV, the worst, and the figures.

    Raises:
        ConfigError: the source holds something that cannot be measured so, or as `find_models`.
        OSError: the output cannot be written.
    """
    base, folders = find_models(config, config.controlnet)
    conventions = [find_convention(config, base, folder) for folder in folders]
    for name, convention in zip(config.controlnet, conventions, strict=True):
        if convention.sizes != conventions[0].sizes:
            raise ConfigError(
                f"--controlnet {name}: trained on other sizes than {config.controlnet[0]}; give "
                "--resolution, or --height and --width, for all."
            )
    source = open_source(SourceSettings(source=str(config.source)))
    samples = list(_samples(config, source, conventions[0]))
    measures = [MEASURES[name] for name in _chosen(config, samples)]
    titles = [WITH] if len(folders) == 1 else titles_of(config.controlnet)
    ways = [*titles, WITHOUT]
    for folder in (*(config.output_dir / way for way in ways), config.json_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "score", config)

    drawn = [Drawn(sample, {}, {}) for sample in samples]
    try:
        with tqdm(total=len(samples) * len(ways), unit="picture", disable=None) as bar:
            pipeline = None
            for title, folder, convention in zip(titles, folders, conventions, strict=True):
                del pipeline  # room for the next
                pipeline = load_pipeline(config, base, [folder])
                pipeline.set_progress_bar_config(disable=True)
                _draw_all(config, pipeline, convention, drawn, title, measures, bar)
            parts = {name: getattr(pipeline, name) for name in COMPONENTS}
            alone = StableDiffusion3Pipeline(**parts)
            alone.set_progress_bar_config(disable=True)
            _draw_all(config, alone, conventions[0], drawn, WITHOUT, measures, bar)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error

    figures = {way: summaries(measures, [one.measured[way] for one in drawn]) for way in ways}
    click.echo(table(measures, figures))
    write_text(config.output_dir / "samples.csv", samples_csv(measures, drawn))
    save_png(config.output_dir / "worst.png", worst_sheet(measures[0], drawn))
    written = ["samples.csv", "worst.png", "all pictures"]
    if len(titles) > 1:
        with atomic_file(config.output_dir / "curve.png") as file:
            curve(measures, figures, config.controlnet).savefig(file, format="png", dpi=120)
        written.insert(2, "curve.png")
    write_text(config.json_path, _json(config, figures))
    click.echo(f"{config.output_dir}: {', '.join(written)}; {config.json_path}")


def _samples(config: ScoreConfig, source: Source, convention: Convention) -> Iterator[Sample]:
    """Give rows ready to be drawn.

    Raises:
        ConfigError: an image cannot be used.
    """
    for number, row in enumerate(source.rows(range(min(config.num_samples, len(source))))):
        try:
            conditioning = images.decode(source.read(number, "conditioning_image"))
            size = convention.size(conditioning)
            fitted = images.fit(conditioning, size)
            yield Sample(number, str(row.prompt), fitted, _target(source, number, size))
        except (ValueError, OSError) as error:
            raise ConfigError(f"--source, {row.where}: {error}.") from error


def _target(source: Source, number: int, size: tuple[int, int]) -> Image.Image | None:
    """Return a row's image, or None where the source has none; see `Measure.check`."""
    try:
        data = source.read(number, "image")
    except OSError:
        return None
    return images.fit(images.decode(data), size)


def _chosen(config: ScoreConfig, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return what is to be measured.

    Raises:
        ConfigError: a sample cannot be measured so, or the first in no way.
    """
    names = config.measure or fitting(samples)
    if not names:
        raise ConfigError(
            f"--source {config.source}: nothing to measure: its conditioning images are no "
            "drawings of lines, and it has no images to compare with."
        )
    for sample in samples:
        for name in names:
            try:
                MEASURES[name].check(sample)
            except ValueError as error:
                raise ConfigError(
                    f"--source, row {sample.number + 1}: {error}; --measure {name} needs it. "
                    f"Others: {', '.join(other for other in MEASURES if other != name)}."
                ) from error
    return names


def _draw_all(
    config: ScoreConfig,
    pipeline: Any,
    convention: Convention,
    drawn: Sequence[Drawn],
    way: str,
    measures: Sequence[Measure],
    bar: "tqdm[Any]",
) -> None:
    """Draw every sample one way, in batches of one size, save the pictures and measure them."""
    bar.set_description(way)
    by_size = sorted(drawn, key=lambda one: one.sample.conditioning.size)
    batches = [
        of_size[start : start + config.batch_size]
        for _, group in groupby(by_size, key=lambda one: one.sample.conditioning.size)
        for of_size in [list(group)]
        for start in range(0, len(of_size), config.batch_size)
    ]
    for batch in batches:
        pictures = _draw(config, pipeline, convention, [one.sample for one in batch])
        for one, picture in zip(batch, pictures, strict=True):
            path = config.output_dir / way / f"{one.sample.number:03d}.png"
            save_png(path, picture)
            one.pictures[way] = path
            one.measured[way] = {
                name: value
                for measure in measures
                for name, value in measure.of(picture, one.sample).items()
            }
        bar.update(len(batch))


def _draw(
    config: ScoreConfig,
    pipeline: StableDiffusion3ControlNetPipeline | StableDiffusion3Pipeline,
    convention: Convention,
    batch: Sequence[Sample],
) -> list[Image.Image]:
    """Draw a batch, every way from the same noise.

    The pipeline samples conditioning latents from the global generator, so that figures depend a
    little on how the samples are batched.
    """
    width, height = batch[0].conditioning.size
    arguments: dict[str, Any] = {
        "prompt": [sample.prompt for sample in batch],
        "negative_prompt": [config.negative_prompt] * len(batch),
        "height": height,
        "width": width,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": convention.max_sequence_length,
        "latents": noise(pipeline, batch, config.seed),
    }
    torch.manual_seed(config.seed + batch[0].number)
    if isinstance(pipeline, StableDiffusion3ControlNetPipeline):
        arguments |= {
            "control_image": control_image([sample.conditioning for sample in batch], convention),
            "controlnet_conditioning_scale": config.controlnet_conditioning_scale,
            "control_guidance_start": config.control_guidance_start,
            "control_guidance_end": config.control_guidance_end,
        }
    found: list[Image.Image] = pipeline(**arguments).images
    return found


def noise(pipeline: Any, batch: Sequence[Sample], seed: int) -> Tensor:
    """Return the noise each picture starts from, [B, C, h, w], the same in any batch."""
    width, height = (side // pipeline.vae_scale_factor for side in batch[0].conditioning.size)
    shape = (1, pipeline.transformer.config.in_channels, height, width)
    noises = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sample.number))
        for sample in batch
    ]
    # The pipeline brings it to its device, wherever its models are.
    return torch.cat(noises).to(pipeline.transformer.dtype)


def summaries(measures: Sequence[Measure], measured: Sequence[Values]) -> dict[str, Summary]:
    """Return the summary of each figure, over the pictures that have it."""
    return {
        name: summarize([value for one in measured if (value := one[name]) is not None])
        for measure in measures
        for name in measure.titles
    }


def samples_csv(measures: Sequence[Measure], drawn: Sequence[Drawn]) -> str:
    """Return a line for each sample; a figure that it has not is empty."""
    names = [name for measure in measures for name in measure.titles]
    ways = list(drawn[0].measured)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "prompt", *(f"{way}_{name}" for way in ways for name in names)])
    for one in drawn:
        figures = [one.measured[way][name] for way in ways for name in names]
        rounded = ["" if value is None else f"{value:.4f}" for value in figures]
        writer.writerow([one.sample.number, one.sample.prompt, *rounded])
    return text.getvalue()


def worst_sheet(measure: Measure, drawn: Sequence[Drawn]) -> Image.Image:
    """Return the samples that the first ControlNet does worst, the worst first."""
    ways = list(drawn[0].measured)
    first, chief = ways[0], measure.chief
    title = measure.titles[chief]

    def goodness(one: Drawn) -> float:
        value = one.measured[first][chief]
        return -1.0 if value is None else value

    rows = [
        (
            [one.sample.conditioning, *(thumbnail(one.pictures[way]) for way in ways)],
            f"{one.sample.number}: {title} {goodness(one):.2f}, {one.sample.prompt}",
        )
        for one in sorted(drawn, key=goodness)[:NUM_WORST]
    ]
    return contact_sheet(rows, ["conditioning", *map(_words, ways)])


def table(measures: Sequence[Measure], figures: dict[str, dict[str, Summary]]) -> str:
    """Return the figures as text: mean, its 95 % interval, median."""
    titles = {name: title for one in measures for name, title in one.titles.items()}
    most = max(summary.count for found in figures.values() for summary in found.values())
    lines = []
    for way, found in figures.items():
        lines.append(_words(way))
        for name, summary in found.items():
            of = f"  of {summary.count}" if summary.count < most else ""
            lines.append(f"  {titles[name]:26} {summary}{of}")
    return "\n".join(lines)


def curve(
    measures: Sequence[Measure], figures: dict[str, dict[str, Summary]], names: Sequence[str]
) -> Figure:
    """Return each figure over the ControlNets, by step where they are checkpoints, with intervals.

    Args:
        measures: of the figures.
        figures: by what drew; the base model alone comes last and is a line across.
        names: of the ControlNets, as they were given.
    """
    titles = {name: title for one in measures for name, title in one.titles.items()}
    steps = [CHECKPOINT.findall(name) for name in names]
    places = [int(found[-1]) for found in steps if found]
    by_step = len(places) == len(names)
    if not by_step:
        places = list(range(len(names)))
    *ways, _ = figures
    order = sorted(range(len(ways)), key=lambda at: places[at])
    figure = Figure(figsize=(4 * len(titles), 3.2), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True
    ):
        there = [at for at in order if figures[ways[at]][name].mean is not None]
        summaries_of = [figures[ways[at]][name] for at in there]
        x = [places[at] for at in there]
        axes.plot(x, [one.mean for one in summaries_of], "o-")
        ends = [(one.low, one.high) for one in summaries_of]
        if ends and None not in {end for both in ends for end in both}:
            axes.fill_between(x, [low for low, _ in ends], [high for _, high in ends], alpha=0.2)
        free = figures[WITHOUT][name].mean
        if free is not None:
            axes.axhline(free, linestyle="--", color="grey", label="without ControlNet")
            axes.legend(frameon=False)
        axes.set_title(title)
        if by_step:
            axes.set_xlabel("step")
        else:
            axes.set_xticks(places, ways)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _words(way: str) -> str:
    return {WITH: "with ControlNet", WITHOUT: "without ControlNet"}.get(way, way)


def _json(config: ScoreConfig, figures: dict[str, dict[str, Summary]]) -> str:
    plain = {
        way: {name: asdict(summary) for name, summary in found.items()}
        for way, found in figures.items()
    }
    return json.dumps({"config": as_dict(config), **plain}, ensure_ascii=False, indent=1) + "\n"
