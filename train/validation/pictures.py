"""Validation: pictures of the cached pairs, and the loss on held-out rows.

    validation/step-000000/   before the first step, what the others are compared with
    validation/step-000500/
        0.png                 a pair's conditioning image, then the pictures drawn from it
        0-ema.png             the same, drawn with the averaged weights
        0.safetensors         instead of 0.png if nothing is decoded; python -m infer decode does it
        held_out.json         the held-out loss, by noise level

Axes: B pictures, C latent channels, h x w latent grid, H x W pixels.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor

from common.atomic_files import give_usual_permissions, move_into_place, write_text
from sd3 import vae_decoder
from sd3.vae_decoder import to_bytes
from train import models
from train.assembly import Run
from train.optim.ema import Ema
from train.processes.agreement import main_decides
from train.processes.sharding import reshard
from train.validation.held_out import held_out_loss
from train.validation.sampling import Pair, negative_embeds, sample
from train.watch.curves import AVERAGED_HELD_OUT, HELD_OUT, in_words, mean, of_level, of_set
from train.watch.trackers import log_pictures

LOSSES_FILE = "held_out.json"
PROMPT_KEY = "prompt"  # of the prompt in a picture's file or a file of latents


@dataclass(frozen=True)
class Drawing:
    """The pictures drawn from one pair.

    Attributes:
        name: of its file: the pair's number, with `-ema` if the averaged weights drew it.
        pair: what was drawn.
        latents: raw, as the VAE decodes them, [B, C, h, w].
        images: [B, H, W, 3], 0 to 255; None if nothing is decoded.
    """

    name: str
    pair: Pair
    latents: Tensor
    images: NDArray[np.uint8] | None = None

    def with_conditioning(self) -> NDArray[np.uint8]:
        """Return the conditioning image and the pictures, [1 + B, H, W, 3]."""
        assert self.images is not None
        conditioning = self.pair.conditioning_image.permute(1, 2, 0).numpy()
        return np.stack([conditioning, *self.images])


def folder(run: Run, step: int) -> Path:
    """Return the folder of a step's validation."""
    return run.config.output_dir / "validation" / f"step-{step:06d}"


def is_due(run: Run, step: int) -> bool:
    """Return whether a validation follows a step; step 0 is the run's start."""
    if not run.inputs.validates:
        return False
    return step % run.config.validation_steps == 0 or step == run.num_steps


def is_done(run: Run, step: int) -> bool:
    """Return whether a step's validation is complete; every process must call this."""
    return main_decides(folder(run, step).is_dir)


def read_losses(run: Run, step: int) -> dict[str, list[float]]:
    """Return the held-out losses of a complete validation; every process must call this."""

    def read() -> dict[str, list[float]]:
        path = folder(run, step) / LOSSES_FILE
        losses: dict[str, list[float]] = json.loads(path.read_text()) if path.is_file() else {}
        return losses

    return main_decides(read)


def validate(run: Run, step: int) -> dict[str, list[float]]:
    """Draw the pairs and measure the held-out loss, with the weights and with their average.

    At step 0 the average is the weights, so only these are validated.

    Every process must call this.

    Returns:
        The held-out losses by name and noise level, the same on every process.

    Raises:
        OSError: the pictures cannot be written.
        ShardError: a record is missing or damaged.
    """
    with written_whole(run, folder(run, step)) as partial:
        losses = measure(run, partial, [run.ema] if run.ema and step else [], step)
        if losses and run.accelerator.is_main_process:
            write_text(partial / LOSSES_FILE, json.dumps(losses, indent=1) + "\n")
    return losses


@contextmanager
def written_whole(run: Run, final: Path) -> Iterator[Path]:
    """Give an empty folder to write into, which then takes the place of a folder.

    Every process must call this.
    """
    partial = final.with_name(f"{final.name}.partial")
    if run.accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    yield partial
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        if final.is_dir():
            shutil.rmtree(final)
        move_into_place(partial, final)


def measure(
    run: Run, target: Path, averages: Sequence[Ema], step: int | None = None
) -> dict[str, list[float]]:
    """Draw the pairs into a folder and measure the held-out loss.

    Every process must call this.

    Args:
        run: whose ControlNet is measured.
        target: gets the pictures.
        averages: weights to measure as well; one, or none.
        step: under which the run's trackers get both; None for not at all.

    Returns:
        The held-out losses by name and noise level, the same on every process.
    """
    # Without gradients, and at other batch sizes, all blocks would be compiled once more.
    uncompiled = torch.compiler.set_stance("force_eager") if run.config.compile else nullcontext()
    with uncompiled:
        drawings, losses = _evaluate(run, averages)
    drawings = _decode(run, drawings)
    for drawing in drawings:
        _save(target, drawing)
    gathered = gather_object(drawings if run.accelerator.log_with else [])
    if step is not None and run.accelerator.is_main_process:
        _log(run, sorted(gathered, key=lambda drawing: drawing.name), losses, step)
    return losses


def _evaluate(run: Run, averages: Sequence[Ema]) -> tuple[list[Drawing], dict[str, list[float]]]:
    """Return this process's drawings, not decoded, and the held-out losses by name and level."""
    controlnet = run.accelerator.unwrap_model(run.controlnet)
    drawings: list[Drawing] = []
    losses: dict[str, list[float]] = {}
    controlnet.eval()
    for ema in [None, *averages]:
        with ema.applied() if ema else nullcontext():
            if run.inputs.draws_pictures:
                drawings += _draw(run, controlnet, "-ema" if ema else "")
            if run.inputs.measures_held_out:
                name = AVERAGED_HELD_OUT if ema else HELD_OUT
                losses |= held_out_losses(run, controlnet, name)
    controlnet.train()
    reshard(controlnet)
    return drawings, losses


def held_out_losses(run: Run, controlnet: Any, name: str) -> dict[str, list[float]]:
    """Return the held-out loss by noise level; of several sets each one's, and their mean.

    The mean is by weight, as the samples are drawn. Every process must call this.

    Args:
        run: whose rows these are.
        controlnet: in evaluation mode.
        name: of the loss.
    """
    found: dict[str, list[float]] = {}
    sets = [one for one in run.inputs.sets if one.cache.manifest.held_out]
    for one in sets:
        label = of_set(name, one.name) if len(run.inputs.sets) > 1 else name
        found[label] = held_out_loss(
            one.cache,
            run.accelerator,
            controlnet,
            run.transformer,
            run.objective,
            run.config.validation_batch_size or run.config.train_batch_size,
        )
    if len(run.inputs.sets) == 1:
        return found
    weights = [one.weight for one in sets]
    levels = np.average(list(found.values()), axis=0, weights=weights)
    return {name: levels.tolist()} | found


def _draw(run: Run, controlnet: Any, suffix: str) -> list[Drawing]:
    """Draw this process's share of the pairs, from the same noise at each validation.

    If there are not enough pairs for all processes, the others draw the first one once more and
    drop it, since a forward pass may need all processes.
    """
    config, cache, device = run.config, run.inputs.cache, run.accelerator.device
    pairs, negative = run.inputs.pairs, negative_embeds(cache)
    scheduler = models.load_scheduler(run.inputs.base)
    spec = cache.manifest.latent_spec
    drawings = []
    for first in range(0, len(pairs), run.accelerator.num_processes):
        number = first + run.accelerator.process_index
        pair = pairs[number if number < len(pairs) else 0]
        shape = (config.num_validation_images, *pair.conditioning_latent.shape)
        generator = torch.Generator().manual_seed(config.seed + number)
        latents = sample(
            run.transformer,
            controlnet,
            scheduler,
            pair,
            negative,
            torch.randn(shape, generator=generator).to(device),
            run.objective,
            num_inference_steps=config.validation_inference_steps,
            guidance_scale=config.validation_guidance_scale,
        )
        if number < len(pairs):
            raw = latents.cpu() / spec.scaling_factor + spec.shift_factor
            drawings.append(Drawing(f"{number}{suffix}", pair, raw))
    return drawings


def _decode(run: Run, drawings: list[Drawing]) -> list[Drawing]:
    """Return drawings with their pixels, unless the settings keep the latents."""
    where = run.config.validation_decode
    if where == "latents" or not drawings:
        return drawings
    device = torch.device("cpu") if where == "cpu" else run.accelerator.device
    pixels = vae_decoder.decode(
        run.inputs.base, run.config.variant, [drawing.latents for drawing in drawings], device
    )
    return [
        replace(drawing, images=to_bytes(images))
        for drawing, images in zip(drawings, pixels, strict=True)
    ]


def _save(partial: Path, drawing: Drawing) -> None:
    """Write a drawing with its prompt, since the cache's pairs may be others later."""
    if drawing.images is not None:
        side_by_side = np.concatenate(list(drawing.with_conditioning()), axis=1)
        info = PngInfo()
        info.add_itxt(PROMPT_KEY, drawing.pair.prompt)
        Image.fromarray(side_by_side).save(partial / f"{drawing.name}.png", pnginfo=info)
        return
    tensors = {
        "latents": drawing.latents,
        "conditioning_image": drawing.pair.conditioning_image,
    }
    path = partial / f"{drawing.name}.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path,
        metadata={PROMPT_KEY: drawing.pair.prompt},
    )
    give_usual_permissions(path)


def _log(run: Run, drawings: list[Drawing], losses: dict[str, list[float]], step: int) -> None:
    for name, levels in losses.items():
        values = {of_level(name, level): loss for level, loss in enumerate(levels)}
        whole = mean(levels)
        run.accelerator.log({name: whole, **values}, step=step)
        run.print(f"step {step}: {in_words(name)} {whole:.4f}")
    shown = {
        f"{drawing.name}: {drawing.pair.prompt}": drawing.with_conditioning()
        for drawing in drawings
        if drawing.images is not None
    }
    log_pictures(run.accelerator, shown, step)
