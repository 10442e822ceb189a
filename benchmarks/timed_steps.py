"""Times the steps of an assembled training run, and measures their peak of memory."""

import time
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.presets import reset_accelerate
from train import loop
from train.assembly import Run, assemble
from train.config import TrainConfig
from train.data import RankPlaces, TrainingSamples, read_batches
from train.optim.nonfinite import NonFiniteGuard

MOST_STEPS = 20  # that are timed, or as many as the given seconds hold
WARM_UP = 2  # steps that are not timed


def time_steps(config: TrainConfig, seconds: float) -> tuple[float, int]:
    """Return the seconds a step takes and its peak of memory in bytes; the run is freed.

    Args:
        config: settings of the run.
        seconds: time that steps are measured for.
    """
    steps = TimedSteps(assemble(config))
    try:
        return steps.time_step(seconds), steps.measure_peak()
    finally:
        steps.close()


class TimedSteps:
    """Takes the steps of a run, one after another.

    Args:
        run: the assembled run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = run.accelerator.device
        samples = TrainingSamples(
            [run.inputs.cache], run.inputs.order, seed=0, proportion_empty_prompts=0.0
        )
        places = RankPlaces(0, batch_size=run.config.train_batch_size, rank=0, num_ranks=1)
        workers = run.config.dataloader_num_workers
        pin = self.device.type == "cuda"
        self.batches = read_batches(samples, places, num_workers=workers, pin=pin)
        self.guard = NonFiniteGuard(
            run.optimizer.optimizer,
            scales_loss=run.accelerator.mixed_precision == "fp16",
            update_already_applied=False,
            stop=True,
            sample_key=str,
            print=click.echo,
        )
        self.number = 0

    def take(self) -> None:
        """Take a step."""
        self.number += 1
        loop.take_step(self.run, self.batches, self.guard, self.number)

    def time_step(self, seconds: float) -> float:
        """Return the mean seconds of a step after the warm-up, measured for so many seconds."""
        for _ in range(WARM_UP):
            self.take()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._wait()
        start, count = time.perf_counter(), 0
        while count < MOST_STEPS and time.perf_counter() - start < seconds:
            self.take()
            count += 1
        self._wait()
        return (time.perf_counter() - start) / count

    def measure_peak(self) -> int:
        """Return the peak of allocated bytes in a step after the first."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if not self.number:
            self.take()
        return self._persistent_bytes() + self._step_bytes()

    def close(self) -> None:
        """Stop reading, and free the run."""
        self.batches.close()
        if self.run.fused is not None:
            self.run.fused.close()
        reset_accelerate()
        del self.run, self.guard

    def _wait(self) -> None:
        self.guard.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _persistent_bytes(self) -> int:
        """Return the bytes of weights and of the optimiser's state, shared storage counted once."""
        networks = (self.run.transformer, self.run.controlnet)
        tensors = [
            tensor for network in networks for tensor in (*network.parameters(), *network.buffers())
        ]
        for state in self.run.optimizer.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        nbytes = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}
        return sum(nbytes.values())

    def _step_bytes(self) -> int:
        """Return the peak that the CPU's allocator adds in a step, as torch's profiler sees it."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.take()
        profiler: Any = profiled.profiler
        events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        allocated = peak = 0
        for event in sorted(events, key=lambda event: int(event.start_ns())):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        return peak
