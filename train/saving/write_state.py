"""accelerate's part of a checkpoint, written so that no process waits for one that failed."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

from train.processes.strategy import strategy


def write_state(accelerator: Accelerator, folder: Path) -> None:
    """Write weights, optimiser state and random states; every process must call this.

    Raises:
        OSError, RuntimeError: this process, or another under FSDP2, could not write.
    """
    if strategy(accelerator) == "deepspeed":
        with _errors_held_back(accelerator.deepspeed_engine_wrapped.engine):
            accelerator.save_state(str(folder), save_latest=False)
        return
    try:
        accelerator.save_state(str(folder))
    except CheckpointException as error:
        raise first_failure(error) from error


def first_failure(error: CheckpointException) -> Exception:
    """Return what went wrong first of the failures that torch gathered from all processes.

    Its own exception is no `Exception`, and its text is a traceback of each process.
    """
    (failure, _), *_ = error.failures.values()
    return failure if isinstance(failure, Exception) else RuntimeError(type(failure).__name__)


@contextlib.contextmanager
def _errors_held_back(engine: Any) -> Iterator[None]:
    """Raise what DeepSpeed's processes could not write only after they have met.

    DeepSpeed makes them wait for each other after writing. A process that raised before would leave
    the others waiting for good.
    """
    errors: list[Exception] = []
    writers = ((engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script"))
    for owner, name in writers:
        setattr(owner, name, _keeping(errors, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in writers:
            delattr(owner, name)  # the class' own is found again
    if errors:
        raise errors[0]


def _keeping(errors: list[Exception], write: Callable[..., None]) -> Callable[..., None]:
    def attempt(*arguments: Any, **options: Any) -> None:
        try:
            write(*arguments, **options)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    return attempt
