"""What all processes must agree on, though each looks at the disk for itself."""

from collections.abc import Callable, Mapping
from signal import Signals
from typing import Any, TypeVar

import torch
import torch.distributed
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


class HostGroup:
    """All processes, joined through their hosts, so that none waits for its device.

    Every process must make one, and call its methods together.
    """

    def __init__(self) -> None:
        several = PartialState().num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo") if several else None

    def agreed_signal(self, signal: Signals | None) -> Signals | None:
        """Return the signal that any process has received, or None.

        A signal does not reach all processes in the same step, but they must end after the same.
        """
        (number,) = self._reduce([signal or 0], torch.distributed.ReduceOp.MAX)
        return Signals(int(number)) if number else None

    def sum(self, numbers: list[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        return self._reduce(numbers, torch.distributed.ReduceOp.SUM)

    def _reduce(
        self, numbers: list[float], operation: torch.distributed.ReduceOp.RedOpType
    ) -> list[float]:
        if self._group is None:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(tensor, operation, self._group)
        reduced: list[float] = tensor.tolist()
        return reduced
