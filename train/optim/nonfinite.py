"""Steps whose gradient is not finite: they change nothing, and the samples at fault are named.

Nobody waits for the device: torch's fused optimiser itself leaves such a step out, and what is
reported about a step is read when the next one is under way. Other optimisers cannot be told, so
for them the number is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.device import AsyncHostCopy
from common.errors import RunError

LISTED_SAMPLES = 8
LEFT_OUT = "Its update was left out."
TOO_LATE = "Its update was made: go on from the last checkpoint."
IN_PART = "Weights whose own gradients were finite were updated: go on from the last checkpoint."
ADVICE = (
    "A lower --learning-rate or --mixed-precision bf16 may help; python "
    "-m shards verify looks for damaged numbers; --on-nonfinite skip goes on without such steps."
)


def hold_back(optimizer: Any, bad: Tensor) -> None:
    """Have an optimiser leave out its next update if `bad` is not 0.

    A fused one of torch's is told the way torch's GradScaler does, without reading the number.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad
    elif bad:
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Report:
    """What is known of a step once the device is done with it.

    Attributes:
        step: its number.
        places: of this process's samples.
        copies: `losses`, one a sample, and `bad`, 1 where the gradient is not finite.
    """

    step: int
    places: list[int]
    copies: AsyncHostCopy


class NonFiniteGuard:
    """Watches over a run's steps.

    Args:
        optimizer: torch's own, or one like it.
        scaler: accelerate's, for fp16: it leaves steps out itself, and infinite gradients are how
            it finds its scale; then only losses are watched.
        too_late: whether the step has been taken when its norm is known, as DeepSpeed does.
        in_part: whether weights step one by one, so that some may have before a bad one comes.
        stop: whether to end the run at the first bad step, or to go on.
        name: of the sample at a place.
        say: prints a line.
    """

    def __init__(
        self,
        optimizer: Any,
        scaler: Any,
        *,
        too_late: bool,
        in_part: bool = False,
        stop: bool,
        name: Callable[[int], str],
        say: Callable[[str], None],
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.too_late = too_late
        self.in_part = in_part
        self.stop = stop
        self.name = name
        self.say = say
        self.num_skipped = 0
        self.loss_sum, self.num_losses = 0.0, 0
        self._under_way: Report | None = None

    def before_update(self, norm: Tensor) -> Tensor:
        """Have the optimiser leave out its next update if the gradient's norm is not finite.

        Returns:
            1 if so, else 0, in float32, on the norm's device.
        """
        bad = (~torch.isfinite(norm.detach())).float()
        if self.scaler is not None:
            return torch.zeros_like(bad)
        if not self.too_late:
            hold_back(self.optimizer, bad)
        return bad

    def after_update(self, step: int, places: list[int], losses: Tensor, bad: Tensor) -> None:
        """Take note of a step, and look at the one before it.

        Args:
            step: its number.
            places: of this process's samples.
            losses: one a sample, [len(places)].
            bad: see `before_update`.

        Raises:
            RunError: the one before was bad, and that is to end the run.
        """
        self.finish()
        copies = AsyncHostCopy({"losses": losses.detach(), "bad": bad}, torch.float32)
        self._under_way = Report(step, places, copies)

    def finish(self) -> None:
        """Look at the step under way, waiting for it.

        Raises:
            RunError: it is bad, and that is to end the run.
        """
        report, self._under_way = self._under_way, None
        if report is None:
            return
        found = report.copies.wait()
        finite = torch.isfinite(found["losses"])
        self.loss_sum += float(found["losses"][finite].sum())
        self.num_losses += int(finite.sum())
        if not found["bad"] and (self.scaler is None or bool(finite.all())):
            return
        self.num_skipped += 1
        at_fault = [
            f"{self.name(place)} ({loss:g})"
            for place, loss, fine in zip(
                report.places, found["losses"].tolist(), finite.tolist(), strict=True
            )
            if not fine
        ]
        keys = ", ".join(
            (at_fault or [self.name(place) for place in report.places])[:LISTED_SAMPLES]
        )
        what = (
            "the loss is not finite of" if at_fault else "no loss but the gradient is not finite of"
        )
        line = f"step {report.step}: {what} {keys}."
        if self.stop:
            done = TOO_LATE if self.too_late else IN_PART if self.in_part else LEFT_OUT
            raise RunError(f"{line} {done} {ADVICE}")
        self.say(f"{line} Left out{', but for weights with finite gradients' * self.in_part}.")

    def sums(self) -> Tensor:
        """Return sum and number of the losses since the last call, [2], and start anew."""
        self.finish()
        found = torch.tensor([self.loss_sum, self.num_losses], dtype=torch.float32)
        self.loss_sum, self.num_losses = 0.0, 0
        return found
