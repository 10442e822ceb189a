"""Mean, median and a bootstrap interval of measured values."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Summary:
    """Statistics of one value over several pictures; None where there are too few pictures.

    Attributes:
        count: number of pictures.
        mean: mean value.
        low: lower end of the mean's 95 % interval, by percentile bootstrap (Efron 1979).
        high: upper end of that interval.
        median: median value.
    """

    count: int
    mean: float | None
    low: float | None
    high: float | None
    median: float | None

    def __str__(self) -> str:
        """Return the statistics in one line of fixed width."""
        if self.mean is None:
            return "     -"
        interval = "" if self.low is None else f"  [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.mean:6.2f}{interval}  median {self.median:.2f}"


def summarize(values: Sequence[float]) -> Summary:
    """Return the summary of values; the bootstrap's random numbers are seeded."""
    if not values:
        return Summary(0, None, None, None, None)
    sample = np.asarray(values, dtype=np.float64)
    low = high = None
    if len(sample) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)  # all values alike
            interval = bootstrap(
                (sample,),
                np.mean,
                n_resamples=RESAMPLES,
                confidence_level=CONFIDENCE,
                method="percentile",
                rng=np.random.default_rng(0),
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Summary(len(sample), float(sample.mean()), low, high, float(np.median(sample)))
