"""`python -m benchmarks.memory.true_size`: the stages with a base of true size for real, anywhere.

Weights are random, data are circles. Stages that follow each other in one folder go on from what
is there. Training alone makes up a cache. On two CPU cores SD3 takes some ten minutes a training
step and a minute a picture of stage 1. Printed are the command, its seconds and the most host
memory that it took.
"""

import json
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
from benchmarks.random_weights import save_encoders, save_index, save_transformer
from benchmarks.synthetic import Shape, write_cache
from common.command import CONTEXT
from common.memory.need import GB
from demo.circles import random_circles, write_circles

KIBIBYTE = 1024  # Linux counts resident memory in them


@click.command(context_settings=CONTEXT)
@click.option(
    "--stage",
    type=click.Choice(["precompute", "train", "infer"]),
    default="train",
    show_default=True,
)
@click.option(
    "--base", type=click.Choice(list(TRANSFORMERS)), default="sd3-medium", show_default=True
)
@click.option("--card", default="8gb", show_default=True, help="Preset of training.")
@click.option("--px", default=1024, show_default=True, help="Side of the pictures.")
@click.option("--rows", default=6, show_default=True, help="Rows that stage 1 encodes.")
@click.option("--steps", default=2, show_default=True, help="Steps of training or of drawing.")
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
    elif stage == "infer":
        command = _infer(work_dir, base, steps)
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
    model, cache = work_dir / "base", work_dir / "encoded"
    if not (model / "transformer").is_dir():
        save_transformer(model, TRANSFORMERS[base])
    if not (model / "vae").is_dir():
        AutoencoderKL.from_config(VAE).save_pretrained(model / "vae")
    if not cache.is_dir():
        cache = work_dir / f"cache-{px}"
    if not cache.is_dir():
        write_cache(cache, Shape(side=px // 8), 1, 2)
    return [
        *("python", "-m", "train"),
        *("--config", f"configs/{base}.toml", "--config", f"configs/cards/{card}.toml"),
        *("--pretrained-model-name-or-path", str(model), "--cache", str(cache)),
        *("--num-controlnet-layers", str(num_controlnet_layers), "--max-train-steps", str(steps)),
        *("--output-dir", str(work_dir / "controlnet"), "--report-to", "none"),
    ]


def _infer(work_dir: Path, base: str, steps: int) -> list[str]:
    """Return the command that draws a picture for the first of the rows that were encoded."""
    source, controlnet = work_dir / "circles", work_dir / "controlnet"
    for folder, stage in ((work_dir / "encoded", "precompute"), (controlnet, "train")):
        if not folder.is_dir():
            raise click.UsageError(f"{folder}: is not there; run --stage {stage} first.")
    save_index(work_dir / "base")
    row = json.loads((source / "prompt.json").read_text().splitlines()[0])
    return [
        *("python", "-m", "infer", "generate", "--config", f"configs/{base}.toml"),
        *("--pretrained-model-name-or-path", str(work_dir / "base")),
        *("--controlnet", str(controlnet), "--cache", str(work_dir / "encoded")),
        *("--prompt", row["prompt"], "--image", str(source / row["source"])),
        *("--num-inference-steps", str(steps), "--dtype", "bfloat16"),
        *("--output-dir", str(work_dir / "pictures")),
    ]


if __name__ == "__main__":
    main()
