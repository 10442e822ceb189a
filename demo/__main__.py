"""`python -m demo`: the whole pipeline, from circles to a report, each stage a command of its own.

A stage keeps what an earlier run finished and continues from there; so does the demonstration.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import click

from common.atomic_files import write_text
from common.command import CONTEXT, CommandError, user_errors
from demo.config import DemoConfig, load_config, settings_text
from demo.times import StageTimes

# Stage -> the arguments of `python -m`. Each stage reads its own table of the TOML files.
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
    "configs",
    type=click.Path(path_type=Path),
    multiple=True,
    default=[Path("configs/demo.toml")],
    show_default=True,
    help="TOML file with the tables of all stages. Of several the later ones win.",
)
def main(configs: tuple[Path, ...]) -> None:
    """Draw circles, precompute, train, infer, score, and write a page about it."""
    with user_errors():
        settings = load_config(*configs)
    settings.demo.output_dir.mkdir(parents=True, exist_ok=True)
    times = StageTimes(settings.demo.times, settings_text(configs))
    for stage in STAGES:
        run_stage(stage, configs, times)
    write_report(settings, times.seconds)
    minutes = sum(times.seconds.values()) / 60
    click.secho(
        f"\n{settings.demo.report}: open it in a browser ({minutes:.1f} minutes in all)", bold=True
    )


def run_stage(stage: str, configs: tuple[Path, ...], times: StageTimes) -> None:
    """Run a stage's command and time it; exit with its code if it fails."""
    flags = [word for path in configs for word in ("--config", str(path))]
    command = ["python", "-m", *STAGES[stage], *flags]
    click.secho(f"\n$ {shlex.join(command)}", bold=True)
    with times.measure(stage):
        done = subprocess.run([sys.executable, *command[1:]], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)


def write_report(settings: DemoConfig, seconds: dict[str, float]) -> None:
    """Write the page about the finished stages."""
    # Imported only now, so that this process takes little memory while the stages run.
    from demo.report import build_report

    try:
        write_text(settings.demo.report, build_report(settings, seconds))
    except OSError as error:
        raise CommandError(f"the report lacks {error.filename}: {error.strerror}") from error


if __name__ == "__main__":
    main(prog_name="python -m demo")
