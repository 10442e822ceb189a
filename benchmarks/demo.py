"""`python -m benchmarks.demo`: the demonstration with several seeds, and how far its score varies.

Each seed has its own circles, training and noise; the base model is the same. Results are added to
the JSON file under the configuration's name and the seed. Run in the repository.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import torch

from demo.config import load_config
from demo.report import machine
from shards.options import CONTEXT
from shards.provenance import commit, versions
from shards.writer import write_text


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
    """Run the demonstration once a seed, each in a folder of its own under runs/."""
    for seed in seeds:
        figures = run(config, seed)
        known = json.loads(results.read_text()) if results.is_file() else {}
        known.setdefault(config.stem, {})[str(seed)] = figures
        write_text(results, json.dumps(known, indent=1, sort_keys=True) + "\n")
    for name, by_seed in json.loads(results.read_text()).items():
        for seed, found in by_seed.items():
            controlled, free = found["with_controlnet"]["iou"], found["without_controlnet"]["iou"]
            click.echo(
                f"{name}, seed {seed}: IoU {controlled['mean']:.3f} "
                f"[{controlled['low']:.3f}, {controlled['high']:.3f}] with, {free['mean']:.3f} "
                f"without; {sum(found['seconds'].values()) / 60:.1f} minutes"
            )


def run(config: Path, seed: int) -> dict[str, Any]:
    """Run the demonstration with a seed; return its figures."""
    place = config.stem
    folder = Path("runs") / f"{place}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / config.name
    write_text(own, config.read_text().replace(f'"runs/{place}', f'"{folder}'))
    subprocess.run(
        [sys.executable, "-m", "demo", "--config", str(own), "--seed", str(seed)], check=True
    )
    settings = load_config(own)
    figures: dict[str, Any] = json.loads(settings.score.json_path.read_text())
    return {
        **{way: figures[way] for way in ("with_controlnet", "without_controlnet")},
        "seconds": json.loads((settings.demo.output_dir / "times.json").read_text()),
        "machine": machine(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "versions": versions(),
        "commit": commit(),
    }


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.demo")
