"""Steps whose gradient is not finite: they change nothing, and the samples at fault are named.

The host does not wait for the device: torch's fused optimiser skips such a step by itself, and what
is reported about a step is read while the next one runs. It waits where the run goes on after such
steps, as in fp16, for a step that is left out moves neither the schedule nor the moving average;
and with other optimisers, which cannot skip by themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.device import AsyncHostCopy
from common.errors import RunError
from train.watch.curves import NUM_LEVELS

LISTED_SAMPLES = 8
# fp16 may leave out some in a row until it finds its loss scale, but hardly 32: that would bring
# it from 2**32 to 1. More will not help then, as with weights that are no longer finite.
MOST_IN_A_ROW = 32
LEFT_OUT = "Its update was left out."
ALREADY_APPLIED = "Its update was made: go on from the last checkpoint."
PARTLY_APPLIED = (
    "Weights whose own gradients were finite were updated: go on from the last checkpoint."
)
HELP = (
    "A lower --learning-rate or --mixed-precision bf16 may help; python "
    "-m shards verify looks for damaged numbers"
)
GO_ON = "--on-nonfinite skip goes on without such steps."


def skip_next_update(optimizer: Any, nonfinite: Tensor) -> None:
    """Make an optimiser skip its next update if `nonfinite` is not 0.

    A fused optimiser of torch's is told as torch's GradScaler tells it, without reading the flag.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = nonfinite
    elif nonfinite:
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Report:
    """What is known about a step once the device has finished it.

    Attributes:
        step: its number.
        places: of this process's samples.
        copies: `losses` and `levels`, one a sample, and `nonfinite`, 1 where the gradient is not
            finite.
    """

    step: int
    places: list[int]
    copies: AsyncHostCopy


class NonFiniteGuard:
    """Skips the updates of steps whose gradient is not finite, and reports them.

    Args:
        optimizer: torch's own, or a compatible one.
        scales_loss: whether losses are scaled, as for fp16. Then such steps are left out without
            our help, and gradients that overflow are no fault but the way to find the scale; so
            only losses are.
        update_already_applied: whether the update is made before the norm is known, as by
            DeepSpeed.
        updates_per_weight: whether weights are updated one by one, so that some may be updated
            before a non-finite gradient comes.
        stop: whether to end the run at the first such step, or to continue.
        sample_key: returns the key of the sample at a place.
        sample_set: returns the number of the set that the sample at a place is of.
        num_sets: how many sets of samples there are.
        print: prints a line.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        scales_loss: bool = False,
        update_already_applied: bool,
        updates_per_weight: bool = False,
        stop: bool,
        sample_key: Callable[[int], str],
        sample_set: Callable[[int], int] = lambda place: 0,
        num_sets: int = 1,
        print: Callable[[str], None],
    ) -> None:
        self.optimizer = optimizer
        self.scales_loss = scales_loss
        self.update_already_applied = update_already_applied
        self.updates_per_weight = updates_per_weight
        self.stop = stop
        self.sample_key, self.sample_set = sample_key, sample_set
        self.print = print
        self.num_skipped = 0
        self._in_a_row = 0
        self.loss_sum, self.num_losses = 0.0, 0
        self._level_sums = torch.zeros(2, NUM_LEVELS, dtype=torch.float64)
        self._set_sums = torch.zeros(2, num_sets, dtype=torch.float64)
        self._pending: Report | None = None

    def before_update(self, norm: Tensor) -> Tensor:
        """Make the optimiser skip its next update if the gradient's norm is not finite.

        Returns:
            1 if it is not finite, else 0, in float32, on the norm's device.
        """
        nonfinite = (~torch.isfinite(norm.detach())).float()
        if not (self.scales_loss or self.update_already_applied):
            skip_next_update(self.optimizer, nonfinite)
        return nonfinite

    def is_left_out(self, nonfinite: Tensor) -> bool:
        """Return whether a step is left out, and the run goes on.

        Args:
            nonfinite: what `before_update` returned.
        """
        return (self.scales_loss or not self.stop) and bool(nonfinite)

    def after_update(
        self, step: int, places: list[int], losses: Tensor, levels: Tensor, nonfinite: Tensor
    ) -> None:
        """Note a step, and examine the one before it.

        Args:
            step: its number.
            places: of this process's samples.
            losses: one a sample, [len(places)].
            levels: of each sample's noise, 0 to NUM_LEVELS - 1, [len(places)].
            nonfinite: what `before_update` returned.

        Raises:
            RunError: the step before was not finite, and the run is to stop then.
        """
        self.finish()
        values = {"losses": losses.detach().float(), "levels": levels}
        copies = AsyncHostCopy(values | {"nonfinite": nonfinite.float()})
        self._pending = Report(step, places, copies)

    def finish(self) -> None:
        """Wait for the last step noted, and examine it.

        Raises:
            RunError: it was not finite, and the run is to stop then, or so many before it were
                not either that the run is lost.
        """
        report, self._pending = self._pending, None
        if report is None:
            return
        copies = report.copies.wait()
        losses, finite = copies["losses"], torch.isfinite(copies["losses"])
        self.loss_sum += float(losses[finite].sum())
        self.num_losses += int(finite.sum())
        of_finite = torch.stack([losses, torch.ones_like(losses)]).double()[:, finite]
        self._level_sums.index_add_(1, copies["levels"][finite], of_finite)
        sets = torch.tensor([self.sample_set(place) for place in report.places])
        self._set_sums.index_add_(1, sets[finite], of_finite)
        if not copies["nonfinite"]:
            self._in_a_row = 0
            return
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row == MOST_IN_A_ROW:
            raise RunError(
                f"step {report.step}: the last {MOST_IN_A_ROW} steps were left out, since their "
                "gradients were not finite. Go on from a checkpoint before them. "
                f"{HELP}."
            )
        if self.scales_loss and bool(finite.all()):
            return
        line = self._describe(report, losses.tolist(), finite.tolist())
        if self.stop:
            raise RunError(f"{line} {self._consequence()} {HELP}; {GO_ON}")
        exception = ", but for weights with finite gradients" if self.updates_per_weight else ""
        self.print(f"{line} Left out{exception}.")

    def pop_loss_sum(self) -> list[float]:
        """Return sum and number of the finite losses examined since the last call."""
        sums = [self.loss_sum, self.num_losses]
        self.loss_sum, self.num_losses = 0.0, 0
        return sums

    def pop_level_sums(self) -> list[float]:
        """Return sums and numbers of these losses at each noise level: all sums, all numbers."""
        sums: list[float] = self._level_sums.flatten().tolist()
        self._level_sums.zero_()
        return sums

    def pop_set_sums(self) -> list[float]:
        """Return sums and numbers of these losses of each set: all sums, all numbers."""
        sums: list[float] = self._set_sums.flatten().tolist()
        self._set_sums.zero_()
        return sums

    def _describe(self, report: Report, losses: list[float], finite: list[bool]) -> str:
        """Return a sentence that names the samples at fault, or all if no loss is at fault."""
        of_samples = zip(report.places, losses, finite, strict=True)
        keys = [f"{self.sample_key(place)} ({loss:g})" for place, loss, ok in of_samples if not ok]
        cause = "the loss is not finite of"
        if not keys:
            keys = [self.sample_key(place) for place in report.places]
            cause = "no loss but the gradient is not finite of"
        return f"step {report.step}: {cause} {', '.join(keys[:LISTED_SAMPLES])}."

    def _consequence(self) -> str:
        if self.update_already_applied:
            return ALREADY_APPLIED
        return PARTLY_APPLIED if self.updates_per_weight else LEFT_OUT
