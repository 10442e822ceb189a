"""The page that a demonstration ends with: one HTML file that needs no other file."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.provenance import commit, machine, versions
from demo.comparison import compare
from demo.config import DemoConfig
from sd3 import images
from sd3.contact_sheet import contact_sheet

NUM_STEPS_SHOWN = 7  # columns of validation pictures; further steps are left out
SMOOTHING = 10  # the curve's points are means of so many logged losses


def build_report(config: DemoConfig, seconds: dict[str, float]) -> str:
    """Return the page about a finished demonstration.

    Args:
        config: its settings; they say where the stages' output is.
        seconds: that each stage took.

    Raises:
        OSError: a stage's output is missing.
    """
    losses = read_losses(config.train.output_dir / config.train.logging_dir)
    steps = max(step for step, _ in losses)
    return render_page(
        config=config,
        seconds=seconds,
        steps=steps,
        blocks=json.loads((config.train.output_dir / "config.json").read_text())["num_layers"],
        score=json.loads(config.score.json_path.read_text()),
        comparison=compare(config, steps),
        progress=to_data_url(draw_progress(config)),
        worst=to_data_url(Image.open(config.score.output_dir / "worst.png")),
        curve=draw_losses(losses),
        versions=versions(),
        commit=commit() or "unknown",
        machine=machine(),
    )


def render_page(**values: Any) -> str:
    """Return the page, its template filled with values."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(values)


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Return (step, loss) as training logged them for TensorBoard, in order.

    Raises:
        FileNotFoundError: the folder has no losses.
    """
    by_step: dict[int, float] = {}
    # One file for each start of training: a resumed run has several.
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if "loss" in events.Tags()["scalars"]:
            by_step |= {event.step: event.value for event in events.Scalars("loss")}
    if not by_step:
        raise FileNotFoundError(2, "no losses in TensorBoard's files here", str(folder))
    return sorted(by_step.items())


def draw_losses(losses: list[tuple[int, float]]) -> str:
    """Return a chart of (step, loss) as an SVG element."""
    steps, values = (np.array(column) for column in zip(*losses, strict=True))
    figure = matplotlib.figure.Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="#b9c7dd", linewidth=1, label="as logged")
    width = min(SMOOTHING, len(values))
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="#1f5fbf", label=f"mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return "<svg" + text.getvalue().split("<svg", 1)[1]


def draw_progress(config: DemoConfig) -> Image.Image:
    """Return the validation pairs before, during and after training, one row for each pair."""
    folders = sorted((config.train.output_dir / "validation").glob("step-*"))
    num_columns = min(len(folders), NUM_STEPS_SHOWN)
    shown = np.unique(np.linspace(0, len(folders) - 1, num_columns).round().astype(int))
    columns = [folders[index] for index in shown]
    rows = []
    for number, (prompt, path) in enumerate(config.precompute.validation_pairs()):
        conditioning = images.load(path)[0]
        drawn = [_crop_result(folder / f"{number}.png") for folder in columns]
        rows.append(([images.fit(conditioning, drawn[0].width), *drawn], prompt))
    steps = [int(folder.name.removeprefix("step-")) for folder in columns]
    headings = [f"step {step}" if step else "before training" for step in steps]
    return contact_sheet(rows, ["conditioning", *headings])


def _crop_result(path: Path) -> Image.Image:
    """Return the right part of a validation picture; the left part is the conditioning image."""
    pair = Image.open(path)
    return pair.crop((pair.width - pair.height, 0, pair.width, pair.height))


def to_data_url(image: Image.Image) -> str:
    """Return an image as a URL that contains it."""
    file = io.BytesIO()
    image.convert("RGB").save(file, format="WEBP", quality=85, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
