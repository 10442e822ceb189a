"""Markdown tables of the figures that the benchmarks write as JSON."""

from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, Any]
NOT_MEASURED = "Not measured yet."


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run_table(figures: Figures) -> str:
    """Return what a run of `make gpu` took, from its record."""
    rows = [[name, f"{seconds:.0f}"] for name, seconds in figures["seconds"].items()]
    rows.append(["in all", f"{sum(figures['seconds'].values()):.0f}"])
    return f"{_made_on(figures['key'] | figures)}\n\n{table(['step', 'seconds'], rows)}"


def train_step_table(figures: Figures) -> str:
    """Return the speed and memory of a training step, from `benchmarks.train_step`."""
    headings = (
        *("settings", "px", "samples a step", "samples/s", "TFLOP/s", "of the matrix rate"),
        *("peak, GB", "estimate / peak"),
    )
    rows = [_train_step_row(row, len(headings)) for row in figures["rows"]]
    rate = f"large matrix products in bfloat16 reach {figures['matrix_tflops']:.1f} TFLOP/s"
    return f"{_made_on(figures)}, {figures['base']}; {rate}\n\n{table(headings, rows)}"


def _train_step_row(row: Figures, count: int) -> list[str]:
    start = [row["name"], str(row["px"])]
    if "failed" in row:
        return start + [row["failed"].replace("|", "/")] + [""] * (count - len(start) - 1)
    measured = row["measured_bytes"]
    return [
        *start,
        str(row["samples"]),
        f"{row['samples_per_second']:.2f}",
        f"{row['tflops']:.1f}",
        f"{row['of_matrix_rate']:.0%}",
        f"{measured / 1e9:.2f}",
        f"{sum(row['estimated_bytes'].values()) / measured:.2f}",
    ]


def precompute_table(figures: Figures) -> str:
    """Return the speed of stage 1's passes, from `benchmarks.precompute`."""
    rows = [
        [name, f"{speed['per_s']:.1f}", f"{speed['busy']:.0%}", f"{speed['loading_s']:.1f}"]
        for name, speed in sorted(figures["speed"].items())
    ]
    headings = ("pass", "records a second", "encoders busy", "seconds to load them")
    px = f"{figures['images']} images of {figures['resolution']} px"
    return f"{_made_on(figures)}, {px}\n\n{table(headings, rows)}"


def presets_table(figures: Figures) -> str:
    """Return the held-out losses of the cards' presets, from `benchmarks.presets`."""
    rows = [
        [
            row["preset"],
            f"{row['held_out_loss']:.4f}",
            f"{row['ratio']:.3f}",
            f"{row['limit']:.2f}",
        ]
        for row in figures["rows"]
    ]
    headings = ("preset", "held-out loss", "relative to float32's", "at most")
    return f"{_made_on(figures)}\n\n{table(headings, rows)}"


def loader_table(figures: Figures) -> str:
    """Return the speed of readers, from `benchmarks.loader`."""
    raw = figures["speed"]["raw"]["gb_per_s"]
    rows = [
        [
            name,
            f"{speed['gb_per_s']:.2f}",
            f"{speed['samples_per_s']:.0f}",
            f"{speed['gb_per_s'] / raw:.2f}",
        ]
        for name, speed in sorted(figures["speed"].items())
    ]
    return f"{_made_on(figures)}\n\n{table(('reader', 'GB/s', 'samples/s', 'of raw'), rows)}"


def _made_on(figures: Figures) -> str:
    commit = (figures.get("commit") or "no commit")[:12]
    return f"{figures['machine']}, torch {figures['versions']['torch']}, {commit}"


# By the name of the JSON file, and of the place in the page.
TABLES: dict[str, Callable[[Figures], str]] = {
    "run": run_table,
    "train_step": train_step_table,
    "precompute": precompute_table,
    "presets": presets_table,
    "loader": loader_table,
}


def fill(page: str, results: dict[str, Figures]) -> str:
    """Return a page with its tables made anew; all else stays as it is.

    A table stands between `<!-- table: NAME -->` and `<!-- end -->`.

    Args:
        page: Markdown.
        results: figures by name; a table without figures says that they are not measured yet.

    Raises:
        ValueError: the page's marks are not one pair for each name in `TABLES`.
    """
    head, *parts = page.split("<!-- table: ")
    filled, names = head, []
    for part in parts:
        name, opened, rest = part.partition(" -->\n")
        _, closed, after = rest.partition("<!-- end -->")
        if not opened or not closed or name not in TABLES:
            raise ValueError(
                f"table {name.splitlines()[0]!r}: not <!-- table: NAME --> … <!-- end -->"
            )
        text = TABLES[name](results[name]) if name in results else NOT_MEASURED
        filled += f"<!-- table: {name} -->\n\n{text}\n\n<!-- end -->{after}"
        names.append(name)
    if sorted(names) != sorted(TABLES):
        raise ValueError(f"tables {sorted(names)}, and there should be {sorted(TABLES)}")
    return filled
