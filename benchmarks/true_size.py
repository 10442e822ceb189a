"""`python -m benchmarks.true_size`: trains a base at its true size for real, on any machine.

Weights are random, the cache is made up. On two CPU cores SD3-medium takes minutes a step. Printed
are the command, its seconds and the most host memory that it took.
"""

import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
from diffusers import AutoencoderKL

from benchmarks.bases import TRANSFORMERS, VAE
from benchmarks.random_weights import save_transformer
from benchmarks.synthetic import Shape, write_cache
from common.command import CONTEXT
from common.memory.need import GB

KIBIBYTE = 1024  # Linux counts resident memory in them


@click.command(context_settings=CONTEXT)
@click.option(
    "--base", type=click.Choice(list(TRANSFORMERS)), default="sd3-medium", show_default=True
)
@click.option("--card", default="8gb", show_default=True, help="A preset of configs/cards/.")
@click.option("--px", default=1024, show_default=True, help="Side of the pictures.")
@click.option("--steps", default=2, show_default=True)
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
    base: str,
    card: str,
    px: int,
    steps: int,
    num_controlnet_layers: int,
    work_dir: Path,
) -> None:
    """Make a base and a cache, and train."""
    model, cache = work_dir / "base", work_dir / f"cache-{px}"
    if not (model / "vae").is_dir():
        save_transformer(model, TRANSFORMERS[base])
        AutoencoderKL.from_config(VAE).save_pretrained(model / "vae")
    if not cache.is_dir():
        write_cache(cache, Shape(side=px // 8), 1, 2)
    command = [
        *("python", "-m", "train"),
        *("--config", f"configs/{base}.toml", "--config", f"configs/cards/{card}.toml"),
        *("--pretrained-model-name-or-path", str(model), "--cache", str(cache)),
        *("--num-controlnet-layers", str(num_controlnet_layers), "--max-train-steps", str(steps)),
        *("--output-dir", str(work_dir / "controlnet"), "--report-to", "none"),
    ]
    click.echo(shlex.join(command))
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command[1:]], check=False)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIBIBYTE
    click.echo(f"{seconds:.0f} s, at most {peak / GB:.1f} GB of host memory")
    ctx.exit(done.returncode)


if __name__ == "__main__":
    main()
