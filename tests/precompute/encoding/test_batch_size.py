"""The size of batches: as many items as fit, by the figures that torch gives of a GPU's memory."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import RunError
from common.memory.exhausted import device_remedies, is_out_of_memory
from precompute.encoding.batch_size import (
    BatchSize,
    find_batch_size,
    in_parts,
)

TOTAL = 1000
CUDA = torch.device("cuda")


class Memory:
    """A GPU's memory as an encoder fills it: so much for the weights, and so much for each item.

    Attributes:
        tried: sizes of the batches that were encoded, those that did not fit with them.
        peak: as `torch.cuda.max_memory_reserved` tells it.
    """

    def __init__(self, weights: int, item: int, peak: int = 0) -> None:
        self.weights, self.item, self.peak = weights, item, peak
        self.tried: list[int] = []

    def encode(self, count: int) -> None:
        self.tried.append(count)
        used = self.weights + self.item * count
        if used > TOTAL:
            raise torch.OutOfMemoryError
        self.peak = max(self.peak, used)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def reset(_: torch.device) -> None:
            self.peak = self.weights

        properties = SimpleNamespace(total_memory=TOTAL)
        for name, value in {
            "get_device_properties": lambda _: properties,
            "max_memory_reserved": lambda _: self.peak,
            "reset_peak_memory_stats": reset,
            "synchronize": lambda _: None,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(
    ("memory", "size", "tried"),
    [
        # 100 + 10 * 64 is 740 of 850 that may be filled; 128 items do not fit at all.
        (Memory(100, 10), 64, [2, 4, 8, 16, 32, 64, 128]),
        # 64 items fit, but they fill 996 of 1,000.
        (Memory(100, 14), 32, [2, 4, 8, 16, 32, 64]),
        # Just as much as may be filled: 50 + 25 * 32.
        (Memory(50, 25), 32, [2, 4, 8, 16, 32, 64]),
        (Memory(100, 600), 1, [2]),
        (Memory(100, 450), 1, [2]),
        # There is room for more, but no batch is larger than this.
        (Memory(100, 1), 256, [2, 4, 8, 16, 32, 64, 128, 256]),
        # What was there before this encoder does not count.
        (Memory(100, 10, peak=990), 64, [2, 4, 8, 16, 32, 64, 128]),
    ],
)
def test_auto_takes_the_largest_power_of_two_that_fits(
    monkeypatch: pytest.MonkeyPatch, memory: Memory, size: int, tried: list[int]
) -> None:
    memory.install(monkeypatch)
    found = find_batch_size("auto", 8, CUDA, memory.encode)
    assert found.now == size
    assert memory.tried == tried


def test_a_given_size_is_taken_and_auto_on_a_cpu_is_the_usual_one() -> None:
    def never(count: int) -> None:
        raise AssertionError(count)

    for given, device, size in (
        (3, CUDA, 3),
        ("auto", torch.device("cpu"), 8),
        ("auto", torch.device("mps"), 8),
    ):
        found = find_batch_size(given, 8, device, never)
        assert found.now == size


def test_auto_tries_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(100, 10)
    memory.install(monkeypatch)
    assert find_batch_size("auto", 8, CUDA, memory.encode, most=5).now == 8
    assert memory.tried == [2, 4, 8]


def halve(most: int) -> tuple[list[int], Callable[..., dict[str, Tensor]]]:
    """An encoder that halves numbers, of which no more than so many fit; and what it was given."""
    given: list[int] = []

    def compute(numbers: Tensor, others: Tensor) -> dict[str, Tensor]:
        given.append(len(numbers))
        if len(numbers) > most:
            raise torch.OutOfMemoryError
        return {"half": numbers / 2, "sum": numbers + others}

    return given, compute


IN_PARTS: Any = {"item": "image", "remedies": ["--vae-dtype bfloat16", "--device cpu"]}


def test_parts_shrink_until_they_fit_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    numbers = torch.arange(10.0)
    given, compute = halve(3)
    size = BatchSize(8)
    assert size.describe("images") == []
    for _ in range(2):
        found = in_parts(compute, [numbers, 2 * numbers], size, **IN_PARTS)
        assert found.keys() == {"half", "sum"}
        assert torch.equal(found["half"], numbers / 2)
        assert torch.equal(found["sum"], 3 * numbers)
    # The size that fits is kept for the next batch.
    assert given == [8, 4, *[2] * 5, *[2] * 5]
    assert size.now == 2
    assert size.describe("images") == ["memory ran out at 8 images a batch; 2 were encoded at once"]


def test_a_memory_that_is_too_small_for_one_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    given, compute = halve(0)
    says = r"a single image: memory is full \(.*\)\. What helps: --vae-dtype bfloat16; --device cpu"
    with pytest.raises(RunError, match=says):
        in_parts(compute, [torch.zeros(4), torch.zeros(4)], BatchSize(4), **IN_PARTS)
    assert given == [4, 2, 1]


def test_on_a_cpu_no_other_device_helps() -> None:
    assert device_remedies(CUDA)[-1] == "--device cpu"
    assert not any("device" in one for one in device_remedies(torch.device("cpu")))


def test_an_attempt_does_not_shrink() -> None:
    given, compute = halve(0)
    size = BatchSize(4, may_shrink=False)
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(compute, [torch.zeros(4), torch.zeros(4)], size, **IN_PARTS)
    assert (given, size.now) == ([4], 4)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling it"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"), True),
        (RunError("CUDA error: out of memory"), False),  # ours, which quotes torch's
        (RunError("a single prompt: memory is full (CUDA out of memory. Tried)"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("CUBLAS_STATUS_ALLOC_FAILED"), False),
    ],
)
def test_full_memory_is_told_from_other_faults(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory

    def compute(part: Tensor) -> dict[str, Tensor]:
        if len(part) > 1:
            raise error
        return {"same": part}

    if is_memory:
        found = in_parts(compute, [torch.arange(4)], BatchSize(4), **IN_PARTS)
        assert torch.equal(found["same"], torch.arange(4))
    else:
        with pytest.raises(type(error)):
            in_parts(compute, [torch.arange(4)], BatchSize(4), **IN_PARTS)
