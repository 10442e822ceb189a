"""What a run tells of its steps, to its tracker and beside its bar, without waiting for the device.

A step's values are read while the next one runs, so they come a step late, under their own number.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from torch import Tensor

from common.device import AsyncHostCopy, peak_device_bytes
from common.progress import Progress
from train.assembly import Run
from train.dashboard.dashboard import Dashboard
from train.optim.nonfinite import NonFiniteGuard
from train.processes.agreement import HostGroup
from train.saving.checkpoints import TrainState
from train.watch import curves


@dataclass(frozen=True)
class Entry:
    """What is known of a step when it is queued.

    Attributes:
        state: of the run after it.
        lr: learning rate after it.
        norm: its gradient's norm, before it was clipped; None where it is never whole.
        seconds: when it was queued, on a clock that stands still in pauses.
    """

    state: TrainState
    lr: float
    norm: AsyncHostCopy | None
    seconds: float


class StepLog:
    """Logs mean loss, gradient norm, rate and memory of steps.

    Args:
        run: whose steps they are.
        guard: examines each step while the next one runs, and adds its losses up.
        hosts: of all processes.
        progress: shows the values.
        dashboard: keeps them, if there is one.
    """

    def __init__(
        self,
        run: Run,
        guard: NonFiniteGuard,
        hosts: HostGroup,
        progress: Progress,
        dashboard: Dashboard | None = None,
    ) -> None:
        self.run = run
        self.guard = guard
        self.hosts = hosts
        self.progress = progress
        self.dashboard = dashboard
        self._pending: Entry | None = None
        self._logged: Entry | None = None
        self._paused = 0.0

    def note(self, state: TrainState, norm: Tensor | None) -> None:
        """Have a step logged once it is known; nothing is read from the device yet.

        Args:
            state: of the run after the step.
            norm: of its gradient, [].
        """
        copy = None if norm is None else AsyncHostCopy({"norm": norm.detach()})
        lr = self.run.schedule.get_last_lr()[0]
        self._pending = Entry(state, lr, copy, time.monotonic() - self._paused)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the last step, log it if it was noted, and stop the clock for a block.

        Raises:
            RunError: the step's gradient was not finite, and the run is to stop then.
        """
        self.guard.finish()
        self.write()
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def write(self) -> None:
        """Log the step that was noted, if one was; the guard has examined it.

        Every process must call this. Losses that are not finite are left out of the mean, which is
        over all samples since the step logged before; without any it is NaN. The rate is of the
        same steps, over all processes and without pauses; the first log has none, since the device
        was idle before.
        """
        entry, self._pending = self._pending, None
        if entry is None:
            return
        sets = [one.name for one in self.run.inputs.sets if one.name]
        sums = [self.guard.pop_loss_sum(), self.guard.pop_level_sums()]
        sums += [self.guard.pop_set_sums()] if sets else []
        summed = iter(self.hosts.sum(list(chain.from_iterable(sums))))
        (loss_sum, count), by_level, *by_set = [list(islice(summed, len(one))) for one in sums]
        loss = loss_sum / count if count else math.nan
        values = {
            curves.LOSS: loss,
            curves.LEARNING_RATE: entry.lr,
            curves.EPOCH: self.run.inputs.order.epochs(entry.state.place),
        }
        levels = [curves.of_level(curves.LOSS, level) for level in range(curves.NUM_LEVELS)]
        values |= _means(levels, by_level)
        for means in by_set:
            values |= _means([curves.of_set(curves.LOSS, name) for name in sets], means)
        shown, rate = {"loss": f"{loss:.4f}"}, None
        if self._logged is not None:
            seconds = max(entry.seconds - self._logged.seconds, 1e-9)
            values[curves.RATE] = rate = (entry.state.place - self._logged.state.place) / seconds
        if entry.norm is not None:
            norm = float(entry.norm.wait()["norm"])
            values[curves.GRADIENT_NORM] = norm
            shown["gradient norm"] = f"{norm:.3g}"
        if self.guard.num_skipped:
            values[curves.STEPS_LEFT_OUT] = self.guard.num_skipped
        if (peak := peak_device_bytes(self.run.accelerator.device)) is not None:
            values[curves.DEVICE_MEMORY] = peak / 1e9
        self.run.accelerator.log(values, step=entry.state.step)
        if self.dashboard is not None:
            self.dashboard.log(entry.state.step, values)
        self.progress.show(shown | {"lr": f"{entry.lr:.2g}"}, rate=rate)
        self._logged = entry


def _means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Return the mean losses of the curves that samples were of, by name.

    Args:
        names: of the curves.
        sums: of the losses of each curve, then how many these are.
    """
    count = len(names)
    of_curves = zip(names, sums[:count], sums[count:], strict=True)
    return {name: loss_sum / number for name, loss_sum, number in of_curves if number}
