"""The pictures that scoring draws of its results: the worst samples, and figures over steps."""

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from infer.scoring.measures import Measure
from infer.scoring.results import WITHOUT, Figures, SampleResult, figure_titles, variant_title
from infer.scoring.statistics import Summary
from sd3.contact_sheet import contact_sheet, thumbnail

NUM_WORST = 8
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def worst_sheet(measure: Measure, results: Sequence[SampleResult]) -> Image.Image:
    """Return a contact sheet of the samples that the first ControlNet does worst, worst first."""
    variants = list(results[0].values)
    title = measure.titles[measure.chief]

    def value_of(result: SampleResult) -> float | None:
        return result.values[variants[0]][measure.chief]

    def goodness(result: SampleResult) -> float:
        value = value_of(result)
        return float("-inf") if value is None else value

    def caption(result: SampleResult) -> str:
        value = value_of(result)
        shown = "none" if value is None else f"{value:.2f}"
        return f"{result.sample.number}: {title} {shown}, {result.sample.prompt}"

    rows = [
        (
            [
                result.sample.conditioning,
                *(thumbnail(result.pictures[variant]) for variant in variants),
            ],
            caption(result),
        )
        for result in sorted(results, key=goodness)[:NUM_WORST]
    ]
    return contact_sheet(rows, ["conditioning", *map(variant_title, variants)])


def draw_curves(measures: Sequence[Measure], figures: Figures, names: Sequence[str]) -> Figure:
    """Return a plot of each figure over the ControlNets, with intervals.

    The horizontal axis is the training step where all ControlNets are checkpoints; else they
    stand in the order given.

    Args:
        measures: measures of the figures.
        figures: summaries by variant; the last variant, the base model alone, is a line across.
        names: the ControlNets' folders or hub ids, in the order of the variants.
    """
    titles = figure_titles(measures)
    *variants, _ = figures
    steps = _steps_of(names)
    positions = steps or list(range(len(names)))
    order = sorted(range(len(variants)), key=lambda index: positions[index])
    figure = Figure(figsize=(4 * len(titles), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, (name, title) in zip(all_axes, titles.items(), strict=True):
        points = [(positions[index], figures[variants[index]][name]) for index in order]
        _draw_curve(axes, points, figures[WITHOUT][name])
        axes.set_title(title)
        if steps:
            axes.set_xlabel("step")
        else:
            axes.set_xticks(positions, variants)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _steps_of(names: Sequence[str]) -> list[int]:
    """Return the checkpoints' training steps, or nothing where one is no checkpoint."""
    matches = [CHECKPOINT.findall(name) for name in names]
    return [int(match[-1]) for match in matches] if all(matches) else []


def _draw_curve(axes: Axes, points: Sequence[tuple[int, Summary]], without: Summary) -> None:
    """Draw means with intervals, and the base model's mean as a line; empty summaries are left out.

    Args:
        axes: where to draw.
        points: horizontal position and summary of each ControlNet.
        without: summary of the base model alone.
    """
    measured = [(x, summary.mean) for x, summary in points if summary.mean is not None]
    positions = [x for x, _ in measured]
    axes.plot(positions, [mean for _, mean in measured], "o-")
    lows = [summary.low for _, summary in points if summary.low is not None]
    highs = [summary.high for _, summary in points if summary.high is not None]
    if positions and len(lows) == len(highs) == len(positions):
        axes.fill_between(positions, lows, highs, alpha=0.2)
    if without.mean is not None:
        axes.axhline(without.mean, linestyle="--", color="grey", label="without ControlNet")
        axes.legend(frameon=False)
