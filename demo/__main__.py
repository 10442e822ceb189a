"""`python -m demo`: the whole pipeline, from circles to a report, each stage a command of its own.

A stage finds what an earlier run left and goes on from there; so does the demonstration.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import click

from common.atomic_files import write_text
from common.options import CONTEXT, CommandError, user_errors
from demo.config import load_config
from demo.times import Times

# Stage -> what `python -m` is given; each reads its own table of the TOML file.
STAGES = {
    "circles": ["demo.circles"],
    "precompute": ["precompute"],
    "train": ["train"],
    "infer": ["infer", "generate"],
    "score": ["infer", "score"],
}


@click.command(context_settings=CONTEXT)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    default=Path("configs/demo.toml"),
    show_default=True,
    help="TOML file with the tables of all stages.",
)
def main(config: Path) -> None:
    """Draw circles, precompute, train, infer, score, and write a page about it."""
    with user_errors():
        settings = load_config(config)
    settings.demo.output_dir.mkdir(parents=True, exist_ok=True)
    times = Times(settings.demo.times, config.read_text())
    for stage, module in STAGES.items():
        command = ["python", "-m", *module, "--config", str(config)]
        click.secho(f"\n$ {shlex.join(command)}", bold=True)
        with times.measure(stage):
            done = subprocess.run([sys.executable, *command[1:]], check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
    # Imported only now: a stage's process should have the memory to itself.
    from demo.report import report_html

    try:
        write_text(settings.demo.report, report_html(settings, times.seconds))
    except OSError as error:
        raise CommandError(f"the report lacks {error.filename}: {error.strerror}") from error
    minutes = sum(times.seconds.values()) / 60
    click.secho(
        f"\n{settings.demo.report}: open it in a browser ({minutes:.1f} minutes in all)", bold=True
    )


if __name__ == "__main__":
    main(prog_name="python -m demo")
