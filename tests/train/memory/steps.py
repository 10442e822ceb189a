"""What steps need, taken one by one outside of the loop."""

from collections.abc import Iterator
from typing import Any

from train.assembly import Run
from train.data import RankPlaces, TrainingSamples, read_batches
from train.optim.nonfinite import NonFiniteGuard


def batches_and_guard(run: Run) -> tuple[Iterator[Any], NonFiniteGuard]:
    """Return a run's batches from its first sample, on one process, and a guard of its steps."""
    samples = TrainingSamples(
        [run.inputs.cache], run.inputs.order, seed=0, proportion_empty_prompts=0.0
    )
    places = RankPlaces(0, batch_size=run.config.train_batch_size, rank=0, num_ranks=1)
    batches = read_batches(samples, places, num_workers=0, pin=False)
    guard = NonFiniteGuard(
        run.optimizer.optimizer,
        update_already_applied=False,
        stop=True,
        sample_key=str,
        print=print,
    )
    return batches, guard
