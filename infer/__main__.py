"""`python -m infer generate|show|score|serve|decode|export`: pictures, figures, files."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from common.command import CONTEXT, stage_command, user_errors
from common.errors import ConfigError
from common.memory.need import Need
from infer.config import (
    DecodeConfig,
    ExportConfig,
    GenerateConfig,
    PipelineConfig,
    ScoreConfig,
    ServeConfig,
)
from infer.misplaced_options import misplaced


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Draw pictures with a trained ControlNet, and measure them."""


# The pipeline is imported only once the command line is known to be good.
def estimated(config: PipelineConfig) -> bool:
    """Print how much memory drawing takes, if that is all that is asked for."""
    if config.estimate:
        from infer.memory.estimate import print_report

        print_report(config)
    return config.estimate


def need(config: PipelineConfig, free: int | None) -> Need:
    """Return the memory that drawing takes."""
    from infer.memory.estimate import need

    return need(config, free)


def run_generate(config: GenerateConfig) -> None:
    """Draw."""
    if estimated(config):
        return
    from infer.drawing.generate import generate

    generate(config)


def run_score(config: ScoreConfig) -> None:
    """Measure."""
    if estimated(config):
        return
    from infer.scoring.score import score

    score(config)


def run_decode(config: DecodeConfig) -> None:
    """Decode."""
    from infer.decode import decode_validations

    decode_validations(config)


def run_export(config: ExportConfig) -> None:
    """Export."""
    from infer.exporting.export import export

    export(config)


def run_serve(config: ServeConfig) -> None:
    """Serve the page."""
    if estimated(config):
        return
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("gradio is not installed: pip install '.[serve]'")
    from infer.serve import serve

    serve(config)


def like(path: Path) -> dict[str, Any]:
    """Return the settings in a picture's file, as options' values."""
    from infer.drawing import metadata

    settings, warnings = metadata.settings_from(path)
    for warning in warnings:
        click.echo(f"--like: {warning}", err=True)
    return settings


@click.command(context_settings=CONTEXT)
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print the settings that a picture was drawn with; generate --like FILE draws it again."""
    from infer.drawing.metadata import read

    with user_errors():
        about = read(file)
    click.echo(json.dumps(about, ensure_ascii=False, indent=1))


main.add_command(
    stage_command(
        "generate",
        GenerateConfig,
        run_generate,
        section="infer",
        misplaced=misplaced(GenerateConfig),
        like=like,
        need=need,
    )
)
main.add_command(show)
main.add_command(
    stage_command(
        "score",
        ScoreConfig,
        run_score,
        section="score",
        misplaced=misplaced(ScoreConfig),
        need=need,
    )
)
main.add_command(
    stage_command(
        "serve",
        ServeConfig,
        run_serve,
        section="serve",
        misplaced=misplaced(ServeConfig),
        need=need,
    )
)
main.add_command(
    stage_command(
        "decode", DecodeConfig, run_decode, section="decode", misplaced=misplaced(DecodeConfig)
    )
)
main.add_command(
    stage_command(
        "export", ExportConfig, run_export, section="export", misplaced=misplaced(ExportConfig)
    )
)

if __name__ == "__main__":
    main(prog_name="python -m infer")
