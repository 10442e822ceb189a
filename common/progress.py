"""How far a run is: a bar on a terminal, lines in a log."""

import time
from collections.abc import Mapping
from typing import Any, Self

import click
from tqdm import tqdm

INTERVAL_S = 10.0


class Progress:
    """A bar where stderr is a terminal; elsewhere lines on stderr, at most one in ten seconds.

    Where there are lines, the last unit has one.

    Args:
        total: units of work.
        unit: what is counted, e.g. "image".
        description: what is done.
        initial: units done before.
        quiet: print nothing, since another process does.
        rate_unit: what the rate in lines counts; by default the unit.
        rate_factor: how many of these a unit is.
        with_values: print lines from `show` only.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        description: str,
        *,
        initial: int = 0,
        quiet: bool = False,
        rate_unit: str | None = None,
        rate_factor: int = 1,
        with_values: bool = False,
    ) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=total,
            unit=unit,
            desc=description,
            initial=initial,
            disable=True if quiet else None,
        )
        self._prints_lines = self._bar.disable and not quiet
        self._what = f"{description}: {{}} of {total} {unit}s"
        self._rate_unit, self._rate_factor = rate_unit or f"{unit}s", rate_factor
        self._with_values = with_values
        self._total, self._done = total, initial
        # Of the last line; at first the beginning.
        self._said_at, self._said_done = time.monotonic(), initial
        self._has_said = False

    def __enter__(self) -> Self:
        """Return the progress itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count units that are done."""
        self._done += count
        self._bar.update(count)
        if self._with_values or not self._prints_lines:
            return
        if self._seconds() >= INTERVAL_S or (self._has_said and self._is_at_end()):
            self._say({})

    def show(self, values: Mapping[str, str], *, rate: float | None = None) -> None:
        """Show values beside the bar, or in a line; the first and the last at once.

        Args:
            values: by name, in the order that they are shown in.
            rate: what `rate_unit` counts, a second. The bar shows it; lines have a rate of their
                own.
        """
        of_bar = dict(values)
        if rate is not None:
            of_bar[f"{self._rate_unit}/s"] = f"{rate:.3g}"
        self._bar.set_postfix(of_bar)
        if not self._prints_lines:
            return
        if not self._has_said or self._seconds() >= INTERVAL_S or self._is_at_end():
            self._say(values)

    def _is_at_end(self) -> bool:
        return self._done >= self._total

    def _seconds(self) -> float:
        return time.monotonic() - self._said_at

    def _say(self, values: Mapping[str, str]) -> None:
        """Print a line, with the rate since the line before and the time that is left at it."""
        rate = (self._done - self._said_done) / max(self._seconds(), 1e-9)
        parts = [self._what.format(self._done), *(f"{key} {text}" for key, text in values.items())]
        if rate > 0:
            left = tqdm.format_interval((self._total - self._done) / rate)
            parts += [f"{rate * self._rate_factor:.3g} {self._rate_unit}/s", f"{left} left"]
        click.echo(", ".join(parts), err=True)
        self._said_at, self._said_done = time.monotonic(), self._done
        self._has_said = True
