"""Draws the samples with one pipeline after another, from the same noise, and measures them.

Axes: B pictures, C latent channels, h x w latent grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusion3ControlNetPipeline, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor

from common.progress import Progress
from infer.batches import split_into_batches
from infer.config import PER_CONTROLNET, ScoreConfig
from infer.convention import Convention, control_arguments
from infer.drawing.prompts import EncodedPrompts
from infer.scoring.measures import Measure, Sample
from infer.scoring.results import SampleResult
from sd3.contact_sheet import save_png


class SampleDrawer:
    """Draws every sample with one pipeline after another, and measures the pictures.

    Args:
        config: settings of the run.
        measures: measures to apply.
        results: one for each sample; pictures and values are added to them.
        progress: counts all pictures.
    """

    def __init__(
        self,
        config: ScoreConfig,
        measures: Sequence[Measure],
        results: Sequence[SampleResult],
        progress: Progress,
    ) -> None:
        self.config = config
        self.measures = measures
        self.progress = progress
        self.prompts = EncodedPrompts()
        self.batches = split_into_batches(sorted(results, key=_size), _size, config.batch_size)

    def draw_all(self, variant: str, pipeline: Any, convention: Convention) -> None:
        """Draw every sample, save the pictures and measure them.

        Args:
            variant: name of what draws.
            pipeline: stock pipeline, with a ControlNet or without.
            convention: the ControlNet's; without one, its token length alone counts.
        """
        pipeline.set_progress_bar_config(disable=True)
        self.progress.show({"drawing": variant})
        for batch in self.batches:
            samples = [result.sample for result in batch]
            pictures = _draw(self.config, pipeline, convention, self.prompts, samples)
            for result, picture in zip(batch, pictures, strict=True):
                path = self.config.output_dir / variant / f"{result.sample.number:03d}.png"
                save_png(path, picture)
                result.pictures[variant] = path
                values = result.values[variant] = {}
                for measure in self.measures:
                    # Controls are drawn again, and compared, when all pictures are there.
                    values |= (
                        dict.fromkeys(measure.titles)
                        if measure.of_redrawn
                        else measure.of(picture, result.sample)
                    )
            self.progress.update(len(batch))


def _size(result: SampleResult) -> tuple[int, int]:
    return result.sample.conditioning.size


def _draw(
    config: ScoreConfig,
    pipeline: StableDiffusion3ControlNetPipeline | StableDiffusion3Pipeline,
    convention: Convention,
    prompts: EncodedPrompts,
    batch: Sequence[Sample],
) -> list[Image.Image]:
    """Draw a batch, from the same noise with every pipeline.

    The pipeline samples conditioning latents from the global generator, so that figures depend a
    little on how the samples are batched.
    """
    width, height = batch[0].conditioning.size
    tokens = convention.max_sequence_length
    texts = [sample.prompt for sample in batch]
    negative = [config.negative_prompt] * len(batch) if config.guidance_scale > 1 else None
    arguments: dict[str, Any] = {
        **prompts.arguments(pipeline, texts, negative, tokens),
        "height": height,
        "width": width,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": tokens,
        "latents": _draw_noise(pipeline, batch, config.seed),
    }
    torch.manual_seed(config.seed + batch[0].number)
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        conditioning = [sample.conditioning for sample in batch]
        arguments |= {
            **control_arguments(conditioning, convention),
            **{name: getattr(config, name)[0] for name in PER_CONTROLNET},
        }
    pictures: list[Image.Image] = pipeline(**arguments).images
    return pictures


def _draw_noise(pipeline: Any, batch: Sequence[Sample], seed: int) -> Tensor:
    """Return the noise each picture starts from, [B, C, h, w], the same in any batch."""
    width, height = (side // pipeline.vae_scale_factor for side in batch[0].conditioning.size)
    shape = (1, pipeline.transformer.config.in_channels, height, width)
    noises = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + sample.number))
        for sample in batch
    ]
    # On the CPU: the pipeline moves it to its device.
    return torch.cat(noises).to(pipeline.transformer.dtype)
