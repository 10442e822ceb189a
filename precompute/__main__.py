"""`python -m precompute`."""

from common.command import stage_command
from common.memory.need import Need
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


def need(config: PrecomputeConfig, free: int | None) -> Need:
    """Return the memory that a run takes."""
    from precompute.memory.estimate import need

    return need(config, free)


main = stage_command(
    "precompute", PrecomputeConfig, run, section="precompute", misplaced=MISPLACED, need=need
)

if __name__ == "__main__":
    main(prog_name="python -m precompute")
