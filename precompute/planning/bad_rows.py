"""Rows that cannot be used: counted, listed, and refused when there are too many."""

from collections.abc import Container, Iterable, Mapping, Sequence

from precompute.planning.inventory import Inventory
from precompute.planning.plan import ProductPlan
from precompute.sources.source import Source
from shards.format import bad_rows, sidecar
from shards.format.sidecar import Skipped

LEFT_OUT_BEFORE = "left out when the shard was made; --retry-bad-rows tries it again"


class BadRows:
    """The rows that had to be left out, by their number in the inventory, and how many may be.

    Args:
        num_rows: rows of the source.
        max_fraction: largest allowed fraction of bad rows.
    """

    def __init__(self, num_rows: int, max_fraction: float) -> None:
        self.num_rows = num_rows
        self.max_fraction = max_fraction
        self.rows: dict[int, Skipped] = {}

    def __len__(self) -> int:
        """Return how many rows are bad."""
        return len(self.rows)

    def add(self, rows: Mapping[int, Skipped]) -> None:
        """Count bad rows, each once.

        Raises:
            ShardError: more rows are bad than the settings allow; with the first of them.
        """
        for row, skipped in rows.items():
            self.rows.setdefault(row, skipped)
        bound = (len(self), self.num_rows, self.max_fraction)
        if bad_rows.too_many(*bound):
            raise bad_rows.refusal(*bound, self._listed())

    def table(self) -> str:
        """Return one line for each of the first rows, and how many more there are."""
        return bad_rows.table(self._listed())

    def _listed(self) -> list[Skipped]:
        return [skipped for _, skipped in sorted(self.rows.items())]


def faulty_rows(source: Source, inventory: Inventory) -> dict[int, Skipped]:
    """Return the rows of an inventory that are known to be bad without decoding, and why."""
    faults = inventory.unreadable | inventory.conditioning_faults | inventory.faults
    return named(source, inventory, {number: faults[number] for number in sorted(faults)})


def named(source: Source, inventory: Inventory, reasons: Mapping[int, str]) -> dict[int, Skipped]:
    """Return rows with their names in the source and why they are bad, by number."""
    rows = source.rows([int(inventory.rows[number]) for number in reasons])
    return {
        number: Skipped(row.name, reason)
        for (number, reason), row in zip(reasons.items(), rows, strict=True)
    }


def items_left_out(product: ProductPlan, shard: int) -> list[int]:
    """Return the planned items of a finished shard that it has no records of."""
    found, plan = sidecar.load(product.folder, shard), product.shard(shard)
    keys = set(found.keys) if found else set()
    return [
        int(item)
        for position, item in enumerate(plan.items)
        if plan.key(position, product.ids) not in keys
    ]


def reasons_before(
    rows: Iterable[int], faults: Container[int], skipped: Sequence[Skipped]
) -> dict[int, str]:
    """Return why a finished shard lacks rows, by row.

    Its sidecar names rows as they were called when it was written, and lines may have moved since.
    But it lists those with known faults first, then the others, each in the order of their slots.

    Args:
        rows: that it lacks, in the order of their slots.
        faults: rows with faults that are known without decoding.
        skipped: what the sidecar lists.
    """
    ordered = sorted(dict.fromkeys(rows), key=lambda row: row not in faults)
    reasons = list({one.row: one.reason for one in skipped}.values())
    reasons += [LEFT_OUT_BEFORE] * (len(ordered) - len(reasons))
    return dict(zip(ordered, reasons, strict=False))
