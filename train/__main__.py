"""`python -m train`, or `accelerate launch -m train`."""

import sys

from common.command import stage_command
from common.interruption import exit_code
from train.config import TrainConfig
from train.misplaced_options import MISPLACED


def run(config: TrainConfig) -> None:
    """Import the networks' libraries only once the command line is known to be good."""
    from train.run import train

    if ended_by := train(config):
        sys.exit(exit_code(ended_by))


main = stage_command("train", TrainConfig, run, section="train", misplaced=MISPLACED)

if __name__ == "__main__":
    main(prog_name="python -m train")
