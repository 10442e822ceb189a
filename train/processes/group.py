"""The group of processes that train together, and its end."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from torch import distributed


@contextmanager
def group_closed_at_the_end() -> Iterator[None]:
    """Close the connections to the other processes, if there are any, at the end of a block.

    The threads of gloo's open connections abort a process that ends (exit code -6), now and then.

    After an error, NCCL's stay open: closing them waits for kernels, which may wait for processes
    that know nothing of the error. The launcher ends those.
    """
    try:
        yield
    except BaseException:
        if distributed.is_initialized() and PartialState().backend == "gloo":
            distributed.destroy_process_group()
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()
