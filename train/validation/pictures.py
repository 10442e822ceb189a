"""Validation: pictures of the cached pairs, and the loss on held-out rows.

    validation/step-000500/
        0.png                 a pair's conditioning image, then what came of it
        0-ema.png             likewise, of the averaged weights
        0.safetensors         instead of these where nothing is decoded; python -m infer decode does
        held_out.json         the held-out loss, by noise level

Axes: B pictures, C latent channels, h x w latent grid, H x W pixels.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from common.atomic_files import write_text
from sd3 import vae_decoder
from sd3.vae_decoder import to_bytes
from train import models
from train.assembly import Run
from train.distribution import forget_gathered
from train.validation.held_out import held_out_loss
from train.validation.sampling import Pair, negative_embeds, read_pairs, sample


@dataclass(frozen=True)
class Picture:
    """What came of a pair.

    Attributes:
        name: of its file; the pair's number, with `-ema` where the averaged weights drew it.
        pair: what was to be drawn.
        latents: raw, as the VAE takes them, [B, C, h, w].
        images: [B, H, W, 3], 0 to 255; None where nothing is decoded.
    """

    name: str
    pair: Pair
    latents: Tensor
    images: NDArray[np.uint8] | None = None

    def row(self) -> NDArray[np.uint8]:
        """Return the conditioning image and the pictures, [1 + B, H, W, 3]."""
        assert self.images is not None
        conditioning = self.pair.conditioning_image.permute(1, 2, 0).numpy()
        return np.stack([conditioning, *self.images])


def folder(run: Run, step: int) -> Path:
    """Return where a step's validation goes."""
    return run.config.output_dir / "validation" / f"step-{step:06d}"


def is_due(run: Run, step: int) -> bool:
    """Tell whether a step is followed by a validation."""
    if not (run.inputs.draws or run.inputs.measures):
        return False
    return step % run.config.validation_steps == 0 or step == run.num_steps


def is_done(run: Run, step: int) -> bool:
    """Tell whether a step's validation is there; on several machines they share the folder."""
    return folder(run, step).is_dir()


def validate(run: Run, step: int) -> None:
    """Draw the pairs and measure the held-out loss, with the weights and with their average.

    Every process must call this.

    Raises:
        OSError: the pictures cannot be written.
        ShardError: a record is missing or damaged.
    """
    model = run.accelerator.unwrap_model(run.controlnet)
    final = folder(run, step)
    partial = final.with_suffix(".partial")
    if run.accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    pictures: list[Picture] = []
    losses: dict[str, list[float]] = {}
    model.eval()
    for average, kind in [(None, ""), *([(run.average, "ema")] if run.average else [])]:
        with average.in_place() if average else contextlib.nullcontext():
            if run.inputs.draws:
                pictures += _draw(run, model, f"-{kind}" if kind else "")
            if run.inputs.measures:
                losses[f"{kind}_held_out_loss" if kind else "held_out_loss"] = held_out_loss(
                    run.inputs.cache,
                    run.accelerator,
                    model,
                    run.transformer,
                    run.objective,
                    run.config.train_batch_size,
                )
    model.train()
    forget_gathered(model)
    pictures = _decoded(run, pictures)
    for picture in pictures:
        _save(partial, picture)
    gathered = gather_object(pictures if run.accelerator.log_with else [])
    if run.accelerator.is_main_process:
        _log(run, sorted(gathered, key=lambda one: one.name), losses, step)
        if losses:
            write_text(partial / "held_out.json", json.dumps(losses, indent=1) + "\n")
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        if final.is_dir():
            shutil.rmtree(final)
        partial.rename(final)


def _draw(run: Run, model: Any, suffix: str) -> list[Picture]:
    """Draw this process's share of the pairs, from the same noise each time.

    Where the pairs do not go round, those left over draw the first once more and drop it, since a
    forward pass may need all processes.
    """
    config, cache, device = run.config, run.inputs.cache, run.accelerator.device
    pairs, negative = read_pairs(cache), negative_embeds(cache)
    scheduler = models.load_scheduler(run.inputs.base)
    spec = cache.manifest.latent_spec
    drawn = []
    for first in range(0, len(pairs), run.accelerator.num_processes):
        number = first + run.accelerator.process_index
        pair = pairs[number if number < len(pairs) else 0]
        shape = (config.num_validation_images, *pair.conditioning_latent.shape)
        generator = torch.Generator().manual_seed(config.seed + number)
        latents = sample(
            run.transformer,
            model,
            scheduler,
            pair,
            negative,
            torch.randn(shape, generator=generator).to(device),
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
        )
        if number < len(pairs):
            raw = latents.cpu() / spec.scaling_factor + spec.shift_factor
            drawn.append(Picture(f"{number}{suffix}", pair, raw))
    return drawn


def _decoded(run: Run, pictures: list[Picture]) -> list[Picture]:
    """Return pictures with their pixels, as the settings ask."""
    where = run.config.validation_decode
    if where == "latents" or not pictures:
        return pictures
    device = torch.device("cpu") if where == "cpu" else run.accelerator.device
    pixels = vae_decoder.decode(
        run.inputs.base, run.config.variant, [picture.latents for picture in pictures], device
    )
    return [
        Picture(picture.name, picture.pair, picture.latents, to_bytes(images))
        for picture, images in zip(pictures, pixels, strict=True)
    ]


def _save(partial: Path, picture: Picture) -> None:
    if picture.images is not None:
        Image.fromarray(np.concatenate(list(picture.row()), axis=1)).save(
            partial / f"{picture.name}.png"
        )
        return
    tensors = {
        "latents": picture.latents,
        "conditioning_image": picture.pair.conditioning_image,
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        partial / f"{picture.name}.safetensors",
        metadata={"prompt": picture.pair.prompt},
    )


def _log(run: Run, pictures: list[Picture], losses: dict[str, list[float]], step: int) -> None:
    for name, levels in losses.items():
        values = {f"{name}/level-{level}": loss for level, loss in enumerate(levels)}
        run.accelerator.log({name: sum(levels) / len(levels), **values}, step=step)
        run.say(f"step {step}: {name.replace('_', ' ')} {sum(levels) / len(levels):.4f}")
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for picture in pictures:
            if picture.images is not None:
                label = f"{picture.name}: {picture.pair.prompt}"
                tracker.log_images({label: picture.row()}, step=step, **layout)
