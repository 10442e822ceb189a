"""`python -m infer`: `generate` draws pictures with a ControlNet, `score` measures them."""

import click

from infer.config import GenerateConfig, ScoreConfig
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


main.add_command(stage_command("generate", GenerateConfig, run_generate, section="infer"))
main.add_command(stage_command("score", ScoreConfig, run_score, section="score"))

if __name__ == "__main__":
    main(prog_name="python -m infer")
