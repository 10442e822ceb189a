"""Measuring how long the encoders compute."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

import torch


class EncoderClock:
    """How long encoders computed.

    Args:
        device: where they compute; on a GPU the time is measured by the GPU.

    Attributes:
        began: when the first encoding began, by `time.perf_counter`; 0 before. Later by the time
            that was left out.
        num_items: how many items they encoded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = 0.0
        self.num_items = 0
        self._seconds = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextlib.contextmanager
    def measure(self, num_items: int) -> Iterator[None]:
        """Add the time until everything that the block starts is computed, and its items."""
        start = time.perf_counter()
        self.began = self.began or start
        self.num_items += num_items
        if self.device.type != "cuda":
            yield
            self._seconds += time.perf_counter() - start
            return
        with torch.cuda.device(self.device):
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self.device)
        events[0].record(stream)
        yield
        events[1].record(stream)
        self._running.append(events)
        while self._running[0][1].query() and len(self._running) > 1:
            self._add_first()

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Count the block's time neither as encoding nor as passed since `began`."""
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

    def _add_first(self) -> None:
        first, last = self._running.popleft()
        self._seconds += first.elapsed_time(last) / 1000

    @property
    def seconds(self) -> float:
        """The time so far, in seconds."""
        if self._running:
            torch.cuda.synchronize(self.device)
        while self._running:
            self._add_first()
        return self._seconds
