"""A chart of the memory that training takes, part by part, by settings and cards."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.random_weights import num_encoder_parameters
from train.memory.simulation import PARTS

ENCODERS = "encoders"


def draw_memory(rows: list[dict[str, Any]], path: Path, base: str) -> None:
    """Draw the memory of the plain setting and of the cards' presets.

    The first bar is the reference's plain setting: the same step, and its encoders, which it keeps
    in memory.

    Args:
        rows: figures of `benchmarks.train_step`.
        path: file of the PNG.
        base: name of the base model.
    """
    px = max(row["px"] for row in rows)
    (plain,) = (row for row in rows if (row["name"], row["px"]) == ("plain, batch 1", px))
    shown = [plain, *(row for row in rows if row["name"].startswith("card"))]
    shown = [row for row in shown if "estimated_bytes" in row]
    encoders = {ENCODERS: 2 * num_encoder_parameters()}
    bars = {"train_controlnet_sd3.py": plain["estimated_bytes"] | encoders}
    bars |= {row["name"]: row["estimated_bytes"] for row in shown}
    measured = {row["name"]: row["measured_bytes"] for row in shown if "measured_bytes" in row}

    figure = Figure(figsize=(9, 0.33 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    _draw_bars(axes, bars)
    if measured:
        places = [list(bars).index(name) for name in measured]
        axes.plot([total / 1e9 for total in measured.values()], places, "k|", label="measured")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("GB of device memory at a step's fullest moment")
    axes.set_title(f"{base}, {px} px, one sample a step, or as a card's preset says")
    figure.legend(loc="outside lower center", ncols=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Axes, bars: dict[str, dict[str, int]]) -> None:
    """Draw horizontal bars of bytes, their parts one after another; parts of no size left out."""
    left = [0.0] * len(bars)
    for part in (*PARTS, ENCODERS):
        sizes = [parts.get(part, 0) / 1e9 for parts in bars.values()]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
