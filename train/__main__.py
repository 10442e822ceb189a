"""`python -m train`, or `accelerate launch -m train`."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from common.command import stage_command
from common.interruption import exit_code
from common.memory.need import Need
from train.config import TrainConfig
from train.misplaced_options import MISPLACED


def run(config: TrainConfig) -> None:
    """Import the networks' libraries only once the command line is known to be good.

    Without LoRAs diffusers is told that transformers and peft are not installed, which saves a
    second each: its models import them for LoRAs alone, peft at their first step.
    """
    from diffusers import utils
    from diffusers.utils import import_utils

    hidden = () if config.lora else ("_transformers_available", "_peft_available")
    with _false(import_utils, hidden):
        from train.run import train
    with _false(utils, () if config.lora else ("USE_PEFT_BACKEND",)):
        ended_by = train(config)
    if ended_by:
        sys.exit(exit_code(ended_by))


@contextlib.contextmanager
def _false(module: ModuleType, names: Sequence[str]) -> Iterator[None]:
    """Have names of a module stand for False meanwhile."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(dict.fromkeys(names, False))
    try:
        yield
    finally:
        vars(module).update(before)


def need(config: TrainConfig, free: int | None) -> Need:
    """Return the memory that a run takes, if the machine has the packages for it."""
    from train.inputs import require_packages
    from train.memory.estimate import need

    require_packages(config)
    return need(config, free)


main = stage_command("train", TrainConfig, run, section="train", misplaced=MISPLACED, need=need)

if __name__ == "__main__":
    main(prog_name="python -m train")
