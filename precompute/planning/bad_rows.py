"""Rows that cannot be used: counted, listed, and refused when there are too many."""

from collections.abc import Iterable

from common.errors import ShardError
from precompute.planning.inventory import Inventory
from precompute.sources.source import Source
from shards.format.sidecar import Skipped


class BadRows:
    """The rows that had to be left out, and the bound on their number.

    Args:
        num_rows: rows of the source.
        max_fraction: largest allowed fraction of bad rows.
    """

    def __init__(self, num_rows: int, max_fraction: float) -> None:
        self.num_rows = num_rows
        self.max_fraction = max_fraction
        self.reasons: dict[str, str] = {}

    def add(self, rows: Iterable[Skipped]) -> None:
        """Count bad rows, each once.

        Raises:
            ShardError: more rows are bad than the settings allow; with the first of them.
        """
        for skipped in rows:
            self.reasons.setdefault(skipped.row, skipped.reason)
        # Divided, not multiplied: 0.29 * 100 is less than 29.
        if self.reasons and len(self.reasons) / self.num_rows > self.max_fraction:
            strict = "" if self.max_fraction else " (--strict)"
            bound = f"--max-bad-fraction {self.max_fraction:g}{strict}"
            raise ShardError(
                f"{len(self.reasons)} of {self.num_rows} rows cannot be used, more than "
                f"{bound} allows:\n{self.table()}\n"
                "Mend or remove them, or allow more. Finished shards are kept."
            )

    def table(self, limit: int = 20) -> str:
        """Return one line for each of the first `limit` rows, and how many more there are."""
        lines = [f"  {row}: {reason}" for row, reason in list(self.reasons.items())[:limit]]
        more = len(self.reasons) - limit
        return "\n".join([*lines, f"  … and {more} more"] if more > 0 else lines)


def bad_rows(source: Source, inventory: Inventory) -> list[Skipped]:
    """Return the rows of an inventory that cannot be used, and why."""
    faults = inventory.conditioning_faults | inventory.faults
    numbers = sorted(faults)
    rows = source.rows([int(inventory.rows[number]) for number in numbers])
    return [Skipped(row.name, faults[number]) for number, row in zip(numbers, rows, strict=True)]
