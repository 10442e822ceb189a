"""`python -m infer generate|score|decode`: pictures with a ControlNet, and their measurement."""

import click

from infer.config import DecodeConfig, GenerateConfig, ScoreConfig
from shards.options import CONTEXT, stage_command


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Draw pictures with a trained ControlNet, and measure them."""


# The pipeline is imported only once the command line is known to be good.
def run_generate(config: GenerateConfig) -> None:
    """Draw."""
    from infer.generate import generate

    generate(config)


def run_score(config: ScoreConfig) -> None:
    """Measure."""
    from infer.score import score

    score(config)


def run_decode(config: DecodeConfig) -> None:
    """Decode."""
    from infer.decode import decode_validations

    decode_validations(config)


main.add_command(stage_command("generate", GenerateConfig, run_generate, section="infer"))
main.add_command(stage_command("score", ScoreConfig, run_score, section="score"))
main.add_command(stage_command("decode", DecodeConfig, run_decode, section="decode"))

if __name__ == "__main__":
    main(prog_name="python -m infer")
