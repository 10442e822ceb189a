"""`python -m benchmarks.memory.true_size`: a stage with a base of true size for real, anywhere.

Weights are random; stage 1 encodes circles, training's cache is made up. On two CPU cores SD3
takes minutes a step, stage 1 half a minute a picture. Printed are the command, its seconds and
the most host memory that it took.
"""

import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL

from benchmarks.bases import TRANSFORMERS, VAE
from benchmarks.random_weights import save_encoders, save_transformer
from benchmarks.synthetic import Shape, write_cache
from common.command import CONTEXT
from common.memory.need import GB
from demo.circles import random_circles, write_circles

KIBIBYTE = 1024  # Linux counts resident memory in them


@click.command(context_settings=CONTEXT)
@click.option(
    "--stage", type=click.Choice(["precompute", "train"]), default="train", show_default=True
)
@click.option(
    "--base", type=click.Choice(list(TRANSFORMERS)), default="sd3-medium", show_default=True
)
@click.option("--card", default="8gb", show_default=True, help="A preset of configs/cards/.")
@click.option("--px", default=1024, show_default=True, help="Side of the pictures.")
@click.option("--rows", default=6, show_default=True, help="Rows that stage 1 encodes.")
@click.option("--steps", default=2, show_default=True, help="Training steps.")
@click.option("--num-controlnet-layers", default=6, show_default=True)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="For base, cache and ControlNet; a base and a cache that are there are used again.",
)
@click.pass_context
def main(
    ctx: click.Context,
    stage: str,
    base: str,
    card: str,
    px: int,
    rows: int,
    steps: int,
    num_controlnet_layers: int,
    work_dir: Path,
) -> None:
    """Make what a stage needs, and run it."""
    if stage == "precompute":
        command = _precompute(work_dir, px, rows)
    else:
        command = _train(work_dir, base, card, px, steps, num_controlnet_layers)
    click.echo(shlex.join(command))
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command[1:]], check=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIBIBYTE
    click.echo(f"{seconds:.0f} s, at most {peak / GB:.1f} GB of host memory")
    ctx.exit(done.returncode)


def _precompute(work_dir: Path, px: int, rows: int) -> list[str]:
    """Return the command of stage 1, for encoders and rows that are made."""
    model, source = work_dir / "base", work_dir / "circles"
    if not (model / "text_encoder_3").is_dir():
        save_encoders(model, dtype=torch.bfloat16)
    if not source.is_dir():
        write_circles(source, random_circles(rows, seed=0))
    return [
        *("python", "-m", "precompute", "--pretrained-model-name-or-path", str(model)),
        *("--source", str(source), "--cache", str(work_dir / "encoded"), "--resolution", str(px)),
        *("--offload", "groups", "--text-dtype", "bfloat16", "--vae-batch-size", "1"),
    ]


def _train(
    work_dir: Path, base: str, card: str, px: int, steps: int, num_controlnet_layers: int
) -> list[str]:
    """Return the command of training, for a base and a cache that are made."""
    model, cache = work_dir / "base", work_dir / f"cache-{px}"
    if not (model / "transformer").is_dir():
        save_transformer(model, TRANSFORMERS[base])
    if not (model / "vae").is_dir():
        AutoencoderKL.from_config(VAE).save_pretrained(model / "vae")
    if not cache.is_dir():
        write_cache(cache, Shape(side=px // 8), 1, 2)
    return [
        *("python", "-m", "train"),
        *("--config", f"configs/{base}.toml", "--config", f"configs/cards/{card}.toml"),
        *("--pretrained-model-name-or-path", str(model), "--cache", str(cache)),
        *("--num-controlnet-layers", str(num_controlnet_layers), "--max-train-steps", str(steps)),
        *("--output-dir", str(work_dir / "controlnet"), "--report-to", "none"),
    ]


if __name__ == "__main__":
    main()
