"""What scoring found for each sample, and its summary.

A variant is what drew a picture: the ControlNet, or each of several by its title; and the base
model without one.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common.options import as_dict
from infer.config import ScoreConfig
from infer.scoring.measures import Measure, Sample, Values
from infer.scoring.statistics import Summary, summarize

WITH, WITHOUT = "with_controlnet", "without_controlnet"
# Summaries by variant, then by the name of the figure.
Figures = dict[str, dict[str, Summary]]


@dataclass(frozen=True)
class SampleResult:
    """The pictures of a sample, and what was measured of them.

    Attributes:
        sample: the sample.
        pictures: file of each variant's picture.
        values: measured values of each variant's picture.
    """

    sample: Sample
    pictures: dict[str, Path]
    values: dict[str, Values]


def figure_titles(measures: Sequence[Measure]) -> dict[str, str]:
    """Return the titles of all figures, by name."""
    return {name: title for measure in measures for name, title in measure.titles.items()}


def variant_title(variant: str) -> str:
    """Return a variant's name for people."""
    return {WITH: "with ControlNet", WITHOUT: "without ControlNet"}.get(variant, variant)


def summarize_variants(measures: Sequence[Measure], results: Sequence[SampleResult]) -> Figures:
    """Return the summary of each figure of each variant, over the pictures that have a value."""
    return {
        variant: {
            name: summarize(
                [value for result in results if (value := result.values[variant][name]) is not None]
            )
            for name in figure_titles(measures)
        }
        for variant in results[0].values
    }


def to_csv(measures: Sequence[Measure], results: Sequence[SampleResult]) -> str:
    """Return a line for each sample; a value that was not measured is empty."""
    columns = [(variant, name) for variant in results[0].values for name in figure_titles(measures)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "prompt", *(f"{variant}_{name}" for variant, name in columns)])
    for result in results:
        values = [result.values[variant][name] for variant, name in columns]
        rounded = ["" if value is None else f"{value:.4f}" for value in values]
        writer.writerow([result.sample.number, result.sample.prompt, *rounded])
    return text.getvalue()


def to_json(config: ScoreConfig, figures: Figures) -> str:
    """Return settings and figures as JSON."""
    by_variant = {
        variant: {name: asdict(summary) for name, summary in summaries.items()}
        for variant, summaries in figures.items()
    }
    document = {"config": as_dict(config), **by_variant}
    return json.dumps(document, ensure_ascii=False, indent=1) + "\n"


def to_table(measures: Sequence[Measure], figures: Figures) -> str:
    """Return the figures as text: mean, its 95 % interval, median."""
    titles = figure_titles(measures)
    most = max(summary.count for summaries in figures.values() for summary in summaries.values())
    lines = []
    for variant, summaries in figures.items():
        lines.append(variant_title(variant))
        for name, summary in summaries.items():
            count = f"  of {summary.count}" if summary.count < most else ""
            lines.append(f"  {titles[name]:26} {summary}{count}")
    return "\n".join(lines)
