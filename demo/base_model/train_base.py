"""`python -m demo.base_model.train_base`: trains the miniature base model and measures it.

It draws circles, trains a VAE on discs and outlines, then trains the transformer and the text
encoders by flow matching on the discs' latents. One pair of colours in ten is kept from training.
It takes minutes on a GPU, one hour on two CPU cores; an interrupted run continues.
"""

from pathlib import Path

import click
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers.utils import logging as transformers_logging

from common.atomic_files import write_text
from common.command import CONTEXT, user_errors
from common.device import keep_freed_memory, pick_device
from demo.base_model import train_flow, train_vae
from demo.base_model.card import model_card
from demo.base_model.pipeline import check_replaceable, save_base
from demo.base_model.quality import measure_base
from demo.base_model.shapes import load_shapes

NUM_SHAPES = 4096
HELD_OUT_SHAPES = 256


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/base-training"),
    show_default=True,
    help="Folder of the state from which an interrupted run continues.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default=None, help="cuda, mps or cpu; the best available by default.")
def main(output_dir: Path, state_dir: Path, seed: int, device: str | None) -> None:
    """Train the miniature base model, save it in half precision, and measure what was saved."""
    transformers_logging.disable_progress_bar()
    with user_errors():
        card = make_base(output_dir, state_dir / f"seed-{seed}", seed, pick_device(device))
    click.echo(card)
    click.echo(f"{output_dir}: saved")


def make_base(output_dir: Path, state_dir: Path, seed: int, device: torch.device) -> str:
    """Train, save and measure a base; return its model card.

    Args:
        output_dir: folder of the base.
        state_dir: folder of the training states of the base with this seed; training continues
            from them.
        seed: of weights, batches and noise.
        device: where to train.

    Raises:
        ConfigError: `output_dir` holds something other than a pipeline.
    """
    check_replaceable(output_dir)
    keep_freed_memory(device)
    state_dir.mkdir(parents=True, exist_ok=True)
    masks, outlines = load_shapes(state_dir / "shapes.safetensors", NUM_SHAPES, seed)
    trained, held_out = slice(None, -HELD_OUT_SHAPES), slice(-HELD_OUT_SHAPES, None)
    vae = train_vae.train_vae(state_dir / "vae.pt", masks[trained], outlines[trained], device, seed)
    latents = train_flow.load_latents(state_dir / "latents.safetensors", vae, masks[trained], seed)
    pipeline = train_flow.build_miniature(seed)
    pipeline.register_modules(vae=vae)
    set_scaling(pipeline, latents["latent"].float())
    train_flow.train_flow(state_dir / "flow.pt", pipeline, latents, device, seed)
    save_base(output_dir, pipeline.to("cpu", torch.float16))
    saved = StableDiffusion3Pipeline.from_pretrained(output_dir, dtype=torch.float32).to(device)
    quality = measure_base(saved, masks[held_out], outlines[held_out], seed)
    card = model_card(saved, quality, seed)
    write_text(output_dir / "README.md", card)
    return card


def set_scaling(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> None:
    """Set the VAE's scale and shift so that its latents have mean 0 and variance 1."""
    pipeline.vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )


if __name__ == "__main__":
    main(prog_name="python -m demo.base_model.train_base")
