"""`python -m benchmarks.demo`: the demonstration with several seeds, to see how its scores vary.

Each seed has its own circles, training and noise; the base model is the same. Results are added to
the JSON file under the configuration's name and the seed. Run in the repository.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from common.atomic_files import write_text
from common.options import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.circles import unseen_circles
from demo.config import load_config
from demo.times import Times
from infer.scoring.results import WITH, WITHOUT

SEEDED = ("circles", "train", "infer", "score")


@click.command(context_settings=CONTEXT)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("configs/demo.toml"),
    show_default=True,
)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/demo.json"),
    show_default=True,
)
def main(config: Path, seeds: tuple[int, ...], results: Path) -> None:
    """Run the demonstration with each seed, in a folder of its own under runs/."""
    for seed in seeds:
        with user_errors():
            figures = run(config, seed)
        known = json.loads(results.read_text()) if results.is_file() else {}
        known.setdefault(config.stem, {})[str(seed)] = figures
        write_text(results, json.dumps(known, indent=1, sort_keys=True) + "\n")
    for name, by_seed in json.loads(results.read_text()).items():
        for seed, figures in by_seed.items():
            controlled, free = figures[WITH]["iou"], figures[WITHOUT]["iou"]
            click.echo(
                f"{name}, seed {seed}: IoU {controlled['mean']:.3f} "
                f"[{controlled['low']:.3f}, {controlled['high']:.3f}] with, {free['mean']:.3f} "
                f"without; {sum(figures['seconds'].values()) / 60:.1f} minutes"
            )


def run(config: Path, seed: int) -> dict[str, Any]:
    """Run the demonstration with a seed; return its figures."""
    folder = Path("runs") / f"{config.stem}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / config.name
    write_text(own, seeded(config, seed, folder))
    subprocess.run([sys.executable, "-m", "demo", "--config", str(own)], check=True)
    settings = load_config(own)
    figures: dict[str, Any] = json.loads(settings.score.json_path.read_text())
    return {
        **{variant: figures[variant] for variant in (WITH, WITHOUT)},
        "seconds": Times(settings.demo.times, own.read_text()).seconds,
        "machine": machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "versions": versions(),
        "commit": commit(),
    }


def seeded(config: Path, seed: int, folder: Path) -> str:
    """Return a demonstration's TOML with another seed for everything random, in another folder."""
    settings, text = load_config(config), config.read_text()
    text = text.replace(f'"{settings.demo.output_dir}', f'"{folder}')
    for stage in SEEDED:
        value = f"[{seed}]" if stage == "infer" else seed
        text = text.replace(f"[{stage}]\n", f"[{stage}]\nseed = {value}\n")
    others = unseen_circles(replace(settings.circles, seed=seed))
    for old, new in zip(settings.precompute.validation_prompt, others, strict=False):
        text = text.replace(f'"{old}"', f'"{new.prompt}"')
    return text


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.demo")
