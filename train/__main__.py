"""`python -m train`, or `accelerate launch -m train`."""

import contextlib
import sys
from collections.abc import Iterator

from common.command import stage_command
from common.interruption import exit_code
from common.memory.need import Need
from train.config import TrainConfig
from train.misplaced_options import MISPLACED


def run(config: TrainConfig) -> None:
    """Import the networks' libraries only once the command line is known to be good."""
    with contextlib.nullcontext() if config.lora else _without_transformers():
        from train.run import train

    if ended_by := train(config):
        sys.exit(exit_code(ended_by))


@contextlib.contextmanager
def _without_transformers() -> Iterator[None]:
    """Have diffusers imported as if transformers were not installed, which saves a second.

    Its models import that library for LoRAs alone.
    """
    from diffusers.utils import import_utils

    available = import_utils._transformers_available
    import_utils._transformers_available = False
    try:
        yield
    finally:
        import_utils._transformers_available = available


def need(config: TrainConfig, free: int | None) -> Need:
    """Return the memory that a run takes, if the machine has the packages for it."""
    from train.inputs import require_packages
    from train.memory.estimate import need

    require_packages(config)
    return need(config, free)


main = stage_command("train", TrainConfig, run, section="train", misplaced=MISPLACED, need=need)

if __name__ == "__main__":
    main(prog_name="python -m train")
