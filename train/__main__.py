"""`python -m train`, or `accelerate launch -m train`."""

from common.command import stage_command
from train.config import TrainConfig
from train.misplaced_options import MISPLACED


def run(config: TrainConfig) -> None:
    """Import the networks' libraries only once the command line is known to be good."""
    from train.run import train

    train(config)


main = stage_command("train", TrainConfig, run, section="train", misplaced=MISPLACED)

if __name__ == "__main__":
    main(prog_name="python -m train")
