"""Charts as SVG elements, which stand in a page without any file."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np

Curve = Sequence[tuple[int, float]]
COLOURS = ("#1f5fbf", "#c2571a", "#566275")
SMOOTHING = 10  # the strong line is the mean of so many points


def curves(
    title: str, named: Mapping[str, Curve], *, smooth: bool = False, baseline: float | None = None
) -> str:
    """Return a chart of curves over steps.

    Args:
        title: of the chart; no two in a page are the same.
        named: (step, value) by label.
        smooth: draw the points faintly, and their running mean.
        baseline: a value to compare with, as a broken line.
    """
    figure, axes = _empty(title)
    for colour, (label, points) in zip(COLOURS, named.items(), strict=False):
        steps, values = (np.array(column) for column in zip(*points, strict=True))
        width = min(SMOOTHING, len(values)) if smooth else 1
        axes.plot(
            steps,
            values,
            color=colour,
            alpha=0.3 if width > 1 else 1,
            linewidth=1,
            marker="" if smooth else "o",
            markersize=3,
            label=None if width > 1 else label,
        )
        if width > 1:
            mean = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(steps[width - 1 :], mean, color=colour, label=f"{label}, mean of {width}")
    if baseline is not None:
        axes.axhline(
            baseline, color="#566275", linestyle="--", linewidth=1, label="before training"
        )
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure, title)


def by_level(title: str, named: Mapping[str, Sequence[float]]) -> str:
    """Return a chart of losses over noise levels, a line a label, the first one broken."""
    figure, axes = _empty(title)
    styles = (("--", "#566275"), ("-", COLOURS[0]), ("-", COLOURS[1]))
    for (line, colour), (label, levels) in zip(styles, named.items(), strict=False):
        at = np.arange(len(levels)) / len(levels)
        axes.plot(at, levels, line, color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("noise level")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure, title)


def _empty(title: str) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    figure = matplotlib.figure.Figure(figsize=(5, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: matplotlib.figure.Figure, title: str) -> str:
    text = io.StringIO()
    # The names of a chart's parts come from its title, so they are no other chart's.
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg" + text.getvalue().split("<svg", 1)[1]
