"""`python -m demo.train_base`: makes the miniature base model from nothing and says how good it is.

Circles are drawn, a VAE is trained on discs and outlines, then the transformer and the text
encoders by flow matching on the discs' latents. One pair of colours in ten is kept from training.
Minutes on a GPU, one to two hours on two CPU cores; interrupted, it goes on.
"""

from pathlib import Path

import click
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from demo.base import save_base
from demo.shapes import HELD_OUT_PAIRS, PALETTE, load_shapes, painted, white_on_black
from demo.train_flow import load_latents, miniature, train_flow
from demo.train_vae import quality, train_vae
from shards.device import pick_device
from shards.options import CONTEXT

NUM_SHAPES = 4096
HELD_OUT_SHAPES = 256


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/base-training"),
    show_default=True,
    help="What an interrupted run goes on from.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default=None, help="cuda, mps or cpu; the best there is if absent.")
def main(output_dir: Path, state_dir: Path, seed: int, device: str | None) -> None:
    """Train the miniature base model and save it in half precision."""
    on = pick_device(device)
    state_dir.mkdir(parents=True, exist_ok=True)
    masks, outlines = load_shapes(state_dir / "shapes.safetensors", NUM_SHAPES, seed)
    seen, unseen = slice(None, -HELD_OUT_SHAPES), slice(-HELD_OUT_SHAPES, None)
    vae = train_vae(state_dir / "vae.pt", masks[seen], outlines[seen], on, seed)
    latents = load_latents(state_dir / "latents.safetensors", vae, masks[seen], seed)
    pipeline = miniature(seed)
    pipeline.register_modules(vae=vae)
    set_scaling(pipeline, latents["latent"].float())
    report(pipeline, masks[unseen], outlines[unseen])
    train_flow(state_dir / "flow.pt", pipeline, latents, on, seed)
    save_base(output_dir, pipeline.to("cpu", torch.float16))
    click.echo(f"{output_dir}: saved")


def set_scaling(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> None:
    """Set the VAE's scale and shift so that its latents have mean 0 and variance 1."""
    pipeline.vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )


def report(pipeline: StableDiffusion3Pipeline, masks: Tensor, outlines: Tensor) -> None:
    """Print how well the VAE reproduces pictures that it has not seen."""
    device = pipeline.vae.device
    pairs = HELD_OUT_PAIRS[torch.arange(len(masks)) * 7 % len(HELD_OUT_PAIRS)]
    discs = painted(masks, PALETTE[pairs]).to(device)
    lines = white_on_black(outlines).to(device)
    config = pipeline.vae.config
    click.echo(
        f"VAE on {len(masks)} unseen: discs {quality(pipeline.vae, discs):.1f} dB, outlines "
        f"{quality(pipeline.vae, lines):.1f} dB; scale {config.scaling_factor}, shift "
        f"{config.shift_factor}"
    )


if __name__ == "__main__":
    main(prog_name="python -m demo.train_base")
