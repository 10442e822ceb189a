"""The size of batches: as many items as fit, by the figures that torch gives of a GPU's memory."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from precompute.encoding.batch_size import BatchSize, find_batch_size, in_parts

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
    assert (found.now, found.may_shrink) == (size, True)
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
        assert (found.now, found.may_shrink) == (size, False)


def halve(most: int) -> tuple[list[int], Callable[..., dict[str, Tensor]]]:
    """An encoder that halves numbers, of which no more than so many fit; and what it was given."""
    given: list[int] = []

    def compute(numbers: Tensor, others: Tensor) -> dict[str, Tensor]:
        given.append(len(numbers))
        if len(numbers) > most:
            raise torch.OutOfMemoryError
        return {"half": numbers / 2, "sum": numbers + others}

    return given, compute


def test_parts_shrink_until_they_fit_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    numbers = torch.arange(10.0)
    given, compute = halve(3)
    size = BatchSize(8, may_shrink=True)
    for _ in range(2):
        found = in_parts(compute, [numbers, 2 * numbers], size)
        assert found.keys() == {"half", "sum"}
        assert torch.equal(found["half"], numbers / 2)
        assert torch.equal(found["sum"], 3 * numbers)
    # The size that fits is kept for the next batch.
    assert given == [8, 4, *[2] * 5, *[2] * 5]
    assert size.now == 2


@pytest.mark.parametrize(
    ("size", "tried"), [(BatchSize(4), [4]), (BatchSize(2, may_shrink=True), [2, 1])]
)
def test_a_memory_that_is_too_small_is_an_error(
    monkeypatch: pytest.MonkeyPatch, size: BatchSize, tried: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    given, compute = halve(0)
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(compute, [torch.zeros(4), torch.zeros(4)], size)
    assert given == tried
