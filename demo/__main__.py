"""`python -m demo`: the whole pipeline, from circles to a report, each stage a command of its own.

A stage finds what an earlier run left and goes on from there; so does the demonstration.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from demo.config import DemoConfig, load_config
from shards.errors import ConfigError
from shards.options import CONTEXT, CommandError
from shards.writer import write_text

# Stage -> what `python -m` is given; each reads its own table of the TOML file.
STAGES = {
    "circles": ["demo.circles"],
    "precompute": ["precompute"],
    "train": ["train"],
    "infer": ["infer", "generate"],
    "score": ["infer", "score"],
}
SEEDED = ("circles", "train", "infer", "score")
TIMES = "times.json"
REPORT = "report.html"


@click.command(context_settings=CONTEXT)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("configs/demo.toml"),
    show_default=True,
    help="TOML file with the tables of all stages.",
)
@click.option("--seed", type=int, help="Of circles, training and pictures; the file's if absent.")
def main(config: Path, seed: int | None) -> None:
    """Draw circles, precompute, train, infer, score, and write a page about it."""
    try:
        settings = load_config(config)
    except ConfigError as error:
        raise CommandError(str(error)) from error
    seconds = read_times(settings)
    for stage, module in STAGES.items():
        command = ["python", "-m", *module, "--config", str(config)]
        if seed is not None and stage in SEEDED:
            command += ["--seed", str(seed)]
        click.secho(f"\n$ {shlex.join(command)}", bold=True)
        start = time.monotonic()
        done = subprocess.run([sys.executable, *command[1:]], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        # Summed over runs, so that an interrupted stage's first part counts.
        seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
        write_text(settings.demo.output_dir / TIMES, json.dumps(seconds, indent=1) + "\n")
    # Imported only now: a stage's process should have the memory to itself.
    from demo.report import report_html

    path = settings.demo.output_dir / REPORT
    write_text(path, report_html(settings, seconds))
    total = sum(seconds.values())
    click.secho(f"\n{path}: open it in a browser ({total / 60:.1f} minutes in all)", bold=True)


def read_times(settings: DemoConfig) -> dict[str, float]:
    """Return how long each stage took in earlier runs, in seconds."""
    settings.demo.output_dir.mkdir(parents=True, exist_ok=True)
    path = settings.demo.output_dir / TIMES
    return dict(json.loads(path.read_text())) if path.is_file() else {}


if __name__ == "__main__":
    main(prog_name="python -m demo")
