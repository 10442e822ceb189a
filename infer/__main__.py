"""`python -m infer generate`: pictures from a ControlNet."""

import click

from infer.config import GenerateConfig
from shards.options import CONTEXT, stage_command


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Draw pictures with a trained ControlNet."""


def run(config: GenerateConfig) -> None:
    """Import the pipeline only once the command line is known to be good."""
    from infer.generate import generate

    generate(config)


main.add_command(stage_command("generate", GenerateConfig, run, section="infer"))

if __name__ == "__main__":
    main(prog_name="python -m infer")
