"""Source rows that were left out of a cache: how many may be, and how they are listed."""

from collections.abc import Sequence

from common.errors import ShardError
from shards.format.sidecar import Skipped


def too_many(count: int, num_rows: int, max_fraction: float) -> bool:
    """Tell whether more rows are bad than the largest allowed fraction of all rows, or all are.

    A single one is not too many, however few rows there are, unless none is allowed.
    """
    if count == num_rows or max_fraction == 0:
        return count > 0
    # Divided, not multiplied: 0.29 * 100 is less than 29.
    return count > 1 and count / num_rows > max_fraction


def refusal(
    count: int, num_rows: int, max_fraction: float, skipped: Sequence[Skipped]
) -> ShardError:
    """Return the error for too many bad rows, with the first of them."""
    if count == num_rows:
        return ShardError(
            f"none of the {num_rows} rows can be used:\n{table(skipped)}\n"
            "Mend them: a cache without images trains nothing. Finished shards are kept."
        )
    strict = "" if max_fraction else " (--strict)"
    return ShardError(
        f"{count} of {num_rows} rows cannot be used, more than "
        f"--max-bad-fraction {max_fraction:g}{strict} allows:\n{table(skipped)}\n"
        "Mend or remove them, or allow more. Finished shards are kept."
    )


def table(skipped: Sequence[Skipped], limit: int = 20) -> str:
    """Return one line for each of the first `limit` rows, and how many more there are."""
    lines = [f"  {one.row}: {_without_name(one)}" for one in skipped[:limit]]
    more = len(skipped) - limit
    return "\n".join([*lines, f"  … and {more} more"] if more > 0 else lines)


def _without_name(skipped: Skipped) -> str:
    """Return why a row was left out, without its image's name, which the row's ends in."""
    name, _, reason = skipped.reason.partition(": ")
    return reason if reason and skipped.row.endswith(f", {name}") else skipped.reason
