"""`python -m benchmarks.demo`: the demonstration with several seeds, to see how its scores vary.

Each seed has its own circles, training and noise; the base model is the same. Results are added to
the JSON file under the last configuration's name and the seed. Run in the repository.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from common.atomic_files import write_text
from common.command import CONTEXT, user_errors
from common.config_file import config_files
from common.provenance import commit, machine, versions
from demo.circles import unseen_circles
from demo.config import load_config, settings_text
from demo.times import StageTimes
from infer.scoring.results import WITH, WITHOUT

SEEDED = ("circles", "train", "infer", "score")


@click.command(context_settings=CONTEXT)
@click.option(
    "--config",
    "configs",
    type=click.Path(path_type=Path),
    multiple=True,
    default=[Path("configs/demo.toml")],
    show_default=True,
    help="TOML file of the demonstration. Of several the later ones win.",
)
@click.option("--seed", "seeds", type=int, multiple=True, default=(0, 1, 2), show_default=True)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/demo.json"),
    show_default=True,
)
def main(configs: tuple[Path, ...], seeds: tuple[int, ...], results: Path) -> None:
    """Run the demonstration with each seed, in a folder of its own under runs/."""
    for seed in seeds:
        with user_errors():
            figures = run(configs, seed)
        known = json.loads(results.read_text()) if results.is_file() else {}
        known.setdefault(configs[-1].stem, {})[str(seed)] = figures
        write_text(results, json.dumps(known, indent=1, sort_keys=True) + "\n")
    for name, by_seed in json.loads(results.read_text()).items():
        for seed, figures in by_seed.items():
            controlled, free = figures[WITH]["iou"], figures[WITHOUT]["iou"]
            click.echo(
                f"{name}, seed {seed}: IoU {controlled['mean']:.3f} "
                f"[{controlled['low']:.3f}, {controlled['high']:.3f}] with, {free['mean']:.3f} "
                f"without; {sum(figures['seconds'].values()) / 60:.1f} minutes"
            )


def run(configs: Sequence[Path], seed: int) -> dict[str, Any]:
    """Run the demonstration with a seed; return its figures."""
    folder = Path("runs") / f"{configs[-1].stem}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    copies = write_seeded(configs, seed, folder)
    flags = [word for path in copies for word in ("--config", str(path))]
    subprocess.run([sys.executable, "-m", "demo", *flags], check=True)
    settings = load_config(*copies)
    times = StageTimes(settings.demo.times, settings_text(copies))
    figures: dict[str, Any] = json.loads(settings.score.json_path.read_text())
    return {
        **{variant: figures[variant] for variant in (WITH, WITHOUT)},
        "seconds": times.seconds,
        "machine": machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "versions": versions(),
        "commit": commit(),
    }


def write_seeded(configs: Sequence[Path], seed: int, folder: Path) -> list[Path]:
    """Copy a demonstration's TOML files with another seed for everything random.

    Args:
        configs: the files; later ones win.
        seed: of circles, training and noise.
        folder: where the copies go, and the demonstration's outputs in place of its own folder.
    """
    settings = load_config(*configs)
    prompts = settings.precompute.validation_prompt
    circles = unseen_circles(replace(settings.circles, seed=seed))
    copies = []
    for path in (file for config in configs for file in config_files(config)):
        text = path.read_text().replace(f'"{settings.demo.output_dir}/', f'"{folder}/')
        text = text.replace(f'"{settings.demo.output_dir}"', f'"{folder}"')
        for stage in SEEDED:
            value = f"[{seed}]" if stage == "infer" else seed
            text = text.replace(f"[{stage}]\n", f"[{stage}]\nseed = {value}\n")
        for prompt, circle in zip(prompts, circles, strict=False):
            text = text.replace(f'"{prompt}"', f'"{circle.prompt}"')
        copies.append(folder / path.name)
        write_text(copies[-1], text)
    return copies


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.demo")
