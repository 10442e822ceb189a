"""What all processes must agree on, though each looks at the disk for itself."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from common.errors import ConfigError, RunError, ShardError, raised_everywhere

Decision = TypeVar("Decision")


def main_decides(decide: Callable[[], Decision]) -> Decision:
    """Return what a function returns on the main process; every process must call this.

    Processes that look at a shared disk each for themselves may see different files.

    Args:
        decide: called on the main process only; its result must be picklable.

    Raises:
        ConfigError, ShardError, RunError, OSError: on all processes, as `decide` raised it.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = decide()
        except (ConfigError, ShardError, RunError, OSError) as error:
            outcome[1] = error
    result, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise raised_everywhere(problem)
    decision: Decision = result
    return decision


def local_main_first(find: Callable[[], Decision]) -> Decision:
    """Return what a function finds, on each machine's first process before the others.

    Every process must call this. What the first one downloads, the others then find.
    """
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        return find()
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def check_same_everywhere(found: Mapping[str, str]) -> None:
    """Check that all processes found the same; every process must call this.

    Args:
        found: name or digest of what was found, by option.

    Raises:
        ConfigError: two differ; raised on all processes.
    """
    everywhere = gather_object([dict(found)])
    for option, value in everywhere[0].items():
        for rank, others in enumerate(everywhere):
            if others[option] != value:
                raise raised_everywhere(
                    ConfigError(
                        f"{option}: process 0 found {value}, process {rank} {others[option]}. It "
                        "was changed meanwhile, or a network disk still shows an older one: run "
                        "again."
                    )
                )
