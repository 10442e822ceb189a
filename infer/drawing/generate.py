"""Pictures of prompts and conditioning images, by one ControlNet or by several side by side."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusion3ControlNetPipeline
from PIL import Image
from tqdm import tqdm

from common.device import pick_device
from common.errors import ConfigError
from common.provenance import write_run
from infer.config import GenerateConfig, PipelineConfig
from infer.drawing import metadata
from infer.drawing.prompts import CachedPrompts
from infer.drawing.requests import Control, DrawRequest, find_requests
from infer.pipeline import (
    COMPONENTS,
    TEXT_COMPONENTS,
    Convention,
    control_image,
    find_convention,
    find_models,
    load_pipeline,
    out_of_memory,
    titles_of,
)
from sd3 import images
from sd3.contact_sheet import contact_sheet, save_png, thumbnail
from sd3.images import BadImage
from sd3.pretrained import read_config
from shards.reading.cache import Cache
from shards.remote.streaming import LOCAL_CACHE_GB, open_files

SHEET_ROWS = 50  # more make no sheet that anybody looks at


@dataclass(frozen=True)
class Column:
    """ControlNets that draw a picture each: one, or several together.

    Attributes:
        title: short name, no two alike.
        names: as they were given.
        folders: where they are.
        conventions: how each wants to be driven; of one size and token length.
        weights: digest of each one's weights and configuration.
    """

    title: str
    names: tuple[str, ...]
    folders: tuple[Path, ...]
    conventions: tuple[Convention, ...]
    weights: tuple[str, ...]

    @property
    def convention(self) -> Convention:
        """The first one's, which speaks for all but the range of pixels."""
        return self.conventions[0]


@dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Attributes:
        path: of its file.
        about: what its file says of it.
        wanted: the pair.
        seed: of its noise.
        size: width and height in pixels.
        controls: conditioning images, one for each of the column's ControlNets.
    """

    path: Path
    about: str
    wanted: DrawRequest
    seed: int
    size: tuple[int, int]
    controls: tuple[Control, ...]

    def conditioning(self) -> list[Image.Image]:
        """Return the conditioning images, fitted.

        Raises:
            ConfigError: one cannot be.
        """
        fitted = []
        for control in self.controls:
            try:
                fitted.append(images.fit(control.image, self.size))
            except BadImage as error:
                raise ConfigError(f"--image {control.path}: {error}.") from error
        return fitted


def generate(config: GenerateConfig) -> None:
    """Draw what is wanted, each as a PNG with its settings, then a contact sheet of all.

    Pictures that are there, drawn with the same settings from the same images and weights, are left
    as they are.

    Raises:
        ConfigError: an image cannot be read, or base model and ControlNets do not go together.
        RunError: the device's memory is full; finished pictures are kept.
        OSError: the output cannot be written; likewise.
    """
    cache = None
    if config.cache is not None:
        files = open_files(config.cache, None, LOCAL_CACHE_GB)
        cache = Cache(files, config.conditioning_name)
    wanted = find_requests(config, cache)
    prompts = None
    if cache is not None:
        every = [one.prompt for one in wanted]
        if config.guidance_scale > 1:
            every += [one.negative_prompt for one in wanted]
        prompts = CachedPrompts(cache, every)
        if prompts.unknown:
            click.echo(
                f"--cache: {len(prompts.unknown)} prompts are not in it, "
                f"{prompts.unknown[0]!r} first; the text encoders are loaded"
            )
            prompts = None
    base, columns = find_columns(config, encodes=prompts is None)
    if config.combine:
        columns = [combined(columns)]
    if prompts is not None:
        for column in columns:
            prompts.check(column.convention.max_sequence_length, read_config(base, "transformer"))
    plans = [pictures_of(config, column, wanted, len(columns)) for column in columns]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "infer", config)
    planned = [one for plan in plans for one in plan]
    missing = {one.path for one in planned if not metadata.says(one.path, one.about)}
    if len(missing) < len(planned):
        there = len(planned) - len(missing)
        click.echo(f"{there} of {len(planned)} pictures are there already")
    if replaced := sum(path.exists() for path in missing):
        click.echo(f"{replaced} that were drawn otherwise are replaced")
    with tqdm(total=len(missing), unit="picture", desc="generate", disable=None) as bar:
        for column, plan in zip(columns, plans, strict=True):
            if any(one.path in missing for one in plan):
                _draw_column(config, base, column, plan, missing, prompts, bar)
    sheet = config.output_dir / "contact_sheet.png"
    save_png(sheet, _sheet(columns, plans))
    click.echo(sheet)


def find_columns(config: PipelineConfig, *, encodes: bool) -> tuple[Path, list[Column]]:
    """Return the base's folder, and each ControlNet as a column.

    Raises:
        ConfigError: one cannot be found, or does not fit the base.
    """
    components = [name for name in COMPONENTS if encodes or name not in TEXT_COMPONENTS]
    base, folders = find_models(config, config.controlnet, components)
    each = [
        Column(
            title,
            (name,),
            (folder,),
            (find_convention(config, base, folder),),
            (metadata.digest_of(folder),),
        )
        for title, name, folder in zip(
            titles_of(config.controlnet), config.controlnet, folders, strict=True
        )
    ]
    return base, each


def combined(columns: Sequence[Column]) -> Column:
    """Return ControlNets as one column that they draw together.

    Raises:
        ConfigError: the pipeline would drive all as the first, and another wants it otherwise.
    """
    _check_alike(columns)
    parts = [(one.names, one.folders, one.conventions, one.weights) for one in columns]
    return Column(
        "combined", *(tuple(chain.from_iterable(part)) for part in zip(*parts, strict=True))
    )


def _check_alike(columns: Sequence[Column]) -> None:
    def driven(column: Column) -> dict[str, Any]:
        saved = read_config(column.folders[0], "")
        return {
            "zero pooled embeddings": saved.get("force_zeros_for_pooled_projection", True),
            "takes text": saved.get("joint_attention_dim") is not None,
            "max_sequence_length": column.convention.max_sequence_length,
            "sizes": column.convention.sizes,
        }

    first = driven(columns[0])
    for column in columns[1:]:
        other = driven(column)
        if wrong := [key for key, value in other.items() if value != first[key]]:
            raise ConfigError(
                f"--combine: {column.names[0]} wants to be driven otherwise than "
                f"{columns[0].names[0]} "
                f"({', '.join(f'{key} {other[key]}, not {first[key]}' for key in wrong)})."
            )


def pictures_of(
    config: GenerateConfig, column: Column, wanted: Sequence[DrawRequest], num_columns: int
) -> list[Picture]:
    """Return the pictures of a column, ready to be drawn.

    Raises:
        ConfigError: a conditioning image cannot be used, or is one too many or too few.
    """
    several_seeds = any(len(one.seeds) > 1 for one in wanted)
    plan = []
    for number, one in enumerate(wanted):
        controls = one.controls * (len(column.folders) if len(one.controls) == 1 else 1)
        if len(controls) != len(column.folders):
            raise ConfigError(
                f"{len(controls)} conditioning images for {len(column.folders)} ControlNets, "
                f"{controls[0].path} first: give one for each, or one for all."
            )
        size = column.convention.size(controls[0].image)
        for seed in one.seeds:
            name = f"{number:03d}"
            name += f"-seed{seed}" if several_seeds else ""
            name += f"-{column.title}" if num_columns > 1 else ""
            path = config.output_dir / f"{name}.png"
            plan.append(Picture(path, "", one, seed, size, controls))
        plan[-1].conditioning()  # or say now why not
    batches = batches_of(plan, config.batch_size)
    return [
        replace(one, about=_about(config, column, one, [place, len(batch)]))
        for batch in batches
        for place, one in enumerate(batch)
    ]


def batches_of(plan: Sequence[Picture], batch_size: int) -> list[list[Picture]]:
    """Return the pictures that are drawn together, of one size each, in order."""
    found = []
    for _, group in groupby(plan, key=lambda one: one.size):
        of_size = list(group)
        found += [of_size[at : at + batch_size] for at in range(0, len(of_size), batch_size)]
    return found


def _about(config: GenerateConfig, column: Column, one: Picture, batch: list[int]) -> str:
    """Return what a picture's file says of it."""
    return metadata.describe(
        config,
        {
            "images": [control.digest for control in one.wanted.controls],
            "controlnets": list(column.weights),
        },
        {"device": pick_device(config.device).type, "batch": batch},
        controlnet=list(column.names),
        prompt=[one.wanted.prompt],
        negative_prompt=one.wanted.negative_prompt,
        image=[str(control.path.absolute()) for control in one.wanted.controls],
        seed=[one.seed],
        width=one.size[0],
        height=one.size[1],
        max_sequence_length=column.convention.max_sequence_length,
    )


def _draw_column(
    config: GenerateConfig,
    base: Path,
    column: Column,
    plan: Sequence[Picture],
    missing: Set[Path],
    prompts: CachedPrompts | None,
    bar: "tqdm[Any]",
) -> None:
    """Draw a column's pictures and save those that are missing."""
    try:
        pipeline = load_pipeline(config, base, column.folders, encodes=prompts is None)
        pipeline.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None)
        for batch in batches_of(plan, config.batch_size):
            wanted = [one for one in batch if one.path in missing]
            if not wanted:
                continue
            # What was drawn together is drawn together again: it depends on it a little.
            drawn = draw(pipeline, batch, column, prompts, config)
            for picture, image in zip(batch, drawn, strict=True):
                if picture in wanted:
                    save_png(picture.path, image, metadata.info(picture.about))
                    tqdm.write(str(picture.path))
            bar.update(len(wanted))
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error


def draw(
    pipeline: StableDiffusion3ControlNetPipeline,
    batch: Sequence[Picture],
    column: Column,
    prompts: CachedPrompts | None,
    config: GenerateConfig,
) -> list[Image.Image]:
    """Return a batch of pictures.

    The global generator is seeded with the first one's seed: the pipeline samples conditioning
    latents from it. A single picture's noise comes from it too, as in diffusers' own examples; in a
    batch each picture's comes from a generator of its own.
    """
    negative = [one.wanted.negative_prompt for one in batch] if config.guidance_scale > 1 else None
    texts = [one.wanted.prompt for one in batch]
    if prompts is not None:
        device, dtype = pipeline._execution_device, pipeline.transformer.dtype
        given = prompts.arguments(texts, negative, device, dtype)
    else:
        given = {"prompt": texts, "negative_prompt": negative}
    controls: list[Any] = [
        control_image([one.conditioning()[number] for one in batch], convention)
        for number, convention in enumerate(column.conventions)
    ]
    several = len(controls) > 1
    scale = config.controlnet_conditioning_scale
    generator: Any = torch.manual_seed(batch[0].seed)
    if len(batch) > 1:
        generator = [torch.Generator().manual_seed(one.seed) for one in batch]
    result = pipeline(
        **given,
        control_image=controls if several else controls[0],
        width=batch[0].size[0],
        height=batch[0].size[1],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        controlnet_conditioning_scale=[scale] * len(controls) if several else scale,
        control_guidance_start=config.control_guidance_start,
        control_guidance_end=config.control_guidance_end,
        max_sequence_length=column.convention.max_sequence_length,
        generator=generator,
    )
    drawn: list[Image.Image] = result.images
    return drawn


def _sheet(columns: Sequence[Column], plans: Sequence[Sequence[Picture]]) -> Image.Image:
    """Return the first pictures: a row for each pair and seed, a column for each ControlNet."""
    rows = []
    for row in islice(zip(*plans, strict=True), SHEET_ROWS):
        pictures = [thumbnail(one.path) for one in row]
        caption = row[0].wanted.prompt
        seeds = row[0].wanted.seeds
        caption = f"seed {row[0].seed}: {caption}" if len(seeds) > 1 else caption
        rows.append(([*row[0].conditioning(), *pictures], caption))
    headings = ["conditioning"] * len(plans[0][0].controls)
    headings += ["result"] if len(columns) == 1 else [column.title for column in columns]
    return contact_sheet(rows, headings)
