"""`python -m precompute`."""

from common.command import stage_command
from precompute.config import PrecomputeConfig
from precompute.misplaced_options import MISPLACED


def run(config: PrecomputeConfig) -> None:
    """Import the encoders' libraries only once the command line is known to be good."""
    if config.estimate:
        from precompute.memory.estimate import print_estimate

        print_estimate(config)
        return
    from precompute.run import precompute

    precompute(config)


main = stage_command("precompute", PrecomputeConfig, run, section="precompute", misplaced=MISPLACED)

if __name__ == "__main__":
    main(prog_name="python -m precompute")
