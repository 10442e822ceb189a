"""The device by name, and memory that stays with the process."""

import platform

import pytest
import torch

from common import device
from common.device import free_gpu_bytes, free_memory, pick_device
from common.errors import ConfigError
from common.memory.need import CONTEXT_BYTES
from tests.conftest import run_python

FAULTS = """
import resource, threading, torch
from common.device import keep_freed_memory
if {keep}:
    keep_freed_memory(torch.device("cpu"))
def count():
    for _ in range(40):  # until the heap is as large as it gets
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=count)
if {thread}:
    thread.start()
    thread.join()
else:
    count()
"""


def test_an_unknown_device_is_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device nowhere: not available here"):
        pick_device("nowhere")


def test_only_a_gpu_tells_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_gpu_bytes(None) is None  # without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "pick_device", lambda name: torch.device(name or "cuda", 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (5, 8) if gpu.index else (0, 0))
    assert [free_gpu_bytes(name) for name in (None, "cuda", "cpu", "mps")] == [
        5 + CONTEXT_BYTES,
        5 + CONTEXT_BYTES,
        None,
        None,
    ]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("thread", [False, True])
def test_freed_memory_is_used_again(thread: bool) -> None:
    """64 MB, eight times: pages of 4 KiB cleared anew each time, or none."""
    pages = 8 * (1 << 26) // 4096
    default, kept = (
        int(run_python("-c", FAULTS.format(keep=keep, thread=thread)).stdout)
        for keep in (False, True)
    )
    assert kept < pages / 100
    if default < pages / 2:  # huge pages: nothing to be gained here
        pytest.skip(f"{default} page faults by default")


def test_pinned_memory_goes_back_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("device"))
    monkeypatch.setattr(
        torch.accelerator, "empty_host_cache", lambda: emptied.append("host"), raising=False
    )
    free_memory()
    assert emptied == ["device", "host"]
