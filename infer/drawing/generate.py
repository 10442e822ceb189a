"""Pictures of prompts and conditioning images, by one ControlNet or by several side by side."""

from collections.abc import Sequence, Set
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusion3ControlNetPipeline
from PIL import Image
from tqdm import tqdm

from common.checks import for_each
from common.provenance import write_run
from infer.config import PER_CONTROLNET, GenerateConfig
from infer.convention import control_arguments
from infer.drawing import metadata
from infer.drawing.controlnet_set import ControlNetSet, combine, find_controlnet_sets
from infer.drawing.pictures import Picture, batch_pictures, plan_pictures
from infer.drawing.prompts import CachedPrompts, EncodedPrompts
from infer.drawing.requests import DrawRequest, find_requests
from infer.loaded_base import LoadedBase
from infer.photographs import Redrawing, find_redrawing
from infer.pipeline import full_memory_explained, with_dtype
from sd3.base.without_t5 import uses_t5
from sd3.contact_sheet import contact_sheet, save_png, thumbnail
from sd3.pretrained import read_config
from shards.reading.cache import Cache
from shards.remote.streaming import LOCAL_CACHE_GB, open_files

SHEET_ROWS = 50  # nobody looks at a longer contact sheet


def generate(config: GenerateConfig) -> None:
    """Draw the requested pictures, each as a PNG with its settings, and a contact sheet of all.

    Existing pictures that were drawn with the same settings, images and weights are kept.

    Raises:
        ConfigError: an image cannot be read, or base model and ControlNets do not go together.
        RunError: the device's memory is full; finished pictures are kept.
        OSError: the output cannot be written; finished pictures are kept.
    """
    config = with_dtype(config)
    cache = None
    if config.cache is not None:
        files = open_files(config.cache, None, LOCAL_CACHE_GB)
        cache = Cache(files, config.conditioning_name)
    requests = find_requests(config, cache)
    prompts = None if cache is None else _find_cached_prompts(config, cache, requests)
    base, sets = find_controlnet_sets(config, with_text_encoders=prompts is None)
    if config.combine:
        sets = [combine(sets)]
    if prompts is not None:
        for controlnets in sets:
            tokens = controlnets.convention.max_sequence_length
            prompts.check(tokens, read_config(base, "transformer"))
    if cache is None and not config.from_photo:
        _say_images_are_controls(sets)
    plans = [
        plan_pictures(
            config,
            controlnets,
            requests,
            title_in_name=len(sets) > 1,
            redrawings=_find_redrawings(config, controlnets) if config.from_photo else (),
        )
        for controlnets in sets
    ]
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "infer", config)
    missing = _find_missing(list(chain.from_iterable(plans)))
    if missing:
        _draw_missing(config, base, sets, plans, missing, prompts)
    sheet = config.output_dir / "contact_sheet.png"
    save_png(sheet, _draw_sheet(sets, plans))
    click.echo(sheet)


def _say_images_are_controls(sets: Sequence[ControlNetSet]) -> None:
    """Print what the images are taken for, where ControlNets know what drew their controls."""
    conventions = chain.from_iterable(controlnets.conventions for controlnets in sets)
    drawn = dict.fromkeys(one.annotator.name for one in conventions if one.annotator)
    if drawn:
        click.echo(
            f"the images are taken for controls, as drawn by {' and '.join(drawn)}; for "
            "photographs give --from-photo",
            err=True,
        )


def _find_redrawings(config: GenerateConfig, controlnets: ControlNetSet) -> list[Redrawing]:
    """Return what draws the controls of each ControlNet of a set from photographs."""
    return [
        find_redrawing(config, name, convention)
        for name, convention in zip(controlnets.names, controlnets.conventions, strict=True)
    ]


def _find_cached_prompts(
    config: GenerateConfig, cache: Cache, requests: Sequence[DrawRequest]
) -> CachedPrompts | None:
    """Return the embeddings of all prompts, or None where the cache lacks one."""
    texts = [request.prompt for request in requests]
    if config.guidance_scale > 1:
        texts += [request.negative_prompt for request in requests]
    with_t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
    prompts = CachedPrompts(cache, texts, with_t5=with_t5)
    if not prompts.unknown:
        return prompts
    click.echo(
        f"--cache: {len(prompts.unknown)} prompts are not in it, "
        f"{prompts.unknown[0]!r} first; the text encoders are loaded"
    )
    return None


def _find_missing(pictures: Sequence[Picture]) -> set[Path]:
    """Return the files that must be drawn, and print how many are kept."""
    missing = {
        picture.path
        for picture in pictures
        if not metadata.matches(picture.path, picture.description)
    }
    if len(missing) < len(pictures):
        kept = len(pictures) - len(missing)
        click.echo(f"{kept} of {len(pictures)} pictures are there already")
    return missing


def _draw_missing(
    config: GenerateConfig,
    base: Path,
    sets: Sequence[ControlNetSet],
    plans: Sequence[Sequence[Picture]],
    missing: Set[Path],
    prompts: CachedPrompts | None,
) -> None:
    """Draw what is missing, set by set, with a base model that is loaded once."""
    drawing = [
        (controlnets, pictures)
        for controlnets, pictures in zip(sets, plans, strict=True)
        if any(picture.path in missing for picture in pictures)
    ]
    with (
        tqdm(total=len(missing), unit="picture", desc="generate", disable=None) as bar,
        full_memory_explained(config),
    ):
        loaded = LoadedBase(
            config,
            base,
            [controlnets.folders for controlnets, _ in drawing],
            batch_size=config.batch_size,
            with_text_encoders=prompts is None,
        )
        embeddings = prompts or EncodedPrompts()
        for controlnets, pictures in drawing:
            _draw_set(config, loaded, controlnets, pictures, missing, embeddings, bar)


def _draw_set(
    config: GenerateConfig,
    loaded: LoadedBase,
    controlnets: ControlNetSet,
    pictures: Sequence[Picture],
    missing: Set[Path],
    prompts: CachedPrompts | EncodedPrompts,
    bar: "tqdm[Any]",
) -> None:
    """Draw the batches of a set's pictures that have missing ones, and save those."""
    pipeline = loaded.with_controlnets(controlnets.folders)
    # Only now is it known that the weights are whole.
    replaced = {picture.path for picture in pictures if picture.path in missing}
    if count := sum(path.exists() for path in replaced):
        tqdm.write(f"{count} that were drawn otherwise are replaced")
    pipeline.set_progress_bar_config(desc="steps", leave=False, position=1, disable=None)
    for batch in batch_pictures(pictures, config.batch_size):
        num_missing = sum(picture.path in missing for picture in batch)
        if not num_missing:
            continue
        # The batch is drawn whole: a picture depends a little on what is drawn with it.
        drawn = draw(pipeline, batch, controlnets, prompts, config)
        for picture, image in zip(batch, drawn, strict=True):
            if picture.path in missing:
                save_png(picture.path, image, metadata.png_info(picture.description))
                tqdm.write(str(picture.path))
        bar.update(num_missing)


def draw(
    pipeline: StableDiffusion3ControlNetPipeline,
    batch: Sequence[Picture],
    controlnets: ControlNetSet,
    prompts: CachedPrompts | EncodedPrompts,
    config: GenerateConfig,
) -> list[Image.Image]:
    """Return the images of a batch.

    The global generator is seeded with the first picture's seed, because the pipeline samples
    conditioning latents from it. The noise of a single picture also comes from it, as in diffusers'
    own examples; in a batch each picture has a generator of its own.

    Args:
        pipeline: pipeline with the set's ControlNets.
        batch: pictures of one size.
        controlnets: the set.
        prompts: embeddings of the prompts.
        config: settings of the run.
    """
    fitted = [picture.fit_controls() for picture in batch]
    controls = [
        control_arguments([controls_of[number] for controls_of in fitted], convention)
        for number, convention in enumerate(controlnets.conventions)
    ]
    several = len(controls) > 1
    images = [control["control_image"] for control in controls]
    settings: dict[str, Any] = {
        name: for_each(getattr(config, name), len(controls)) for name in PER_CONTROLNET
    }
    if not several:
        settings = {name: values[0] for name, values in settings.items()}
    negative = None
    if config.guidance_scale > 1:
        negative = [picture.request.negative_prompt for picture in batch]
    tokens = controlnets.convention.max_sequence_length
    texts = [picture.request.prompt for picture in batch]
    generator: Any = torch.manual_seed(batch[0].seed)
    if len(batch) > 1:
        generator = [torch.Generator().manual_seed(picture.seed) for picture in batch]
    result = pipeline(
        **prompts.arguments(pipeline, texts, negative, tokens),
        **({"control_image": images} if several else controls[0]),
        width=batch[0].size[0],
        height=batch[0].size[1],
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        **settings,
        max_sequence_length=tokens,
        generator=generator,
    )
    drawn: list[Image.Image] = result.images
    return drawn


def _draw_sheet(sets: Sequence[ControlNetSet], plans: Sequence[Sequence[Picture]]) -> Image.Image:
    """Return the first pictures: a row for each request and seed, a column for each set."""
    rows = []
    for pictures in islice(zip(*plans, strict=True), SHEET_ROWS):
        request, seed = pictures[0].request, pictures[0].seed
        caption = f"seed {seed}: {request.prompt}" if len(request.seeds) > 1 else request.prompt
        cells = [*pictures[0].fit_controls(), *(thumbnail(picture.path) for picture in pictures)]
        rows.append((cells, caption))
    headings = ["conditioning"] * len(plans[0][0].controls)
    headings += ["result"] if len(sets) == 1 else [controlnets.title for controlnets in sets]
    return contact_sheet(rows, headings)
