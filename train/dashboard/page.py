"""`progress.html`: a run at a glance, without a network or any other file."""

import base64
import io
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from common.atomic_files import write_text
from common.options import as_dict
from train.config import TrainConfig
from train.dashboard import records
from train.dashboard.advice import advice
from train.dashboard.records import Records
from train.validation.pictures import PROMPT_KEY
from train.watch.curves import (
    AVERAGED_HELD_OUT,
    GRADIENT_NORM,
    HELD_OUT,
    LEARNING_RATE,
    LOSS,
    RATE,
    mean,
)

PAGE_FILE = "progress.html"
STEPS_SHOWN = 7  # columns of pictures; the others are left out
PICTURE_PX = 192
RECENT = 20  # logs that the speed is told from


def write_page(config: TrainConfig, step: int, num_steps: int, step_samples: int) -> dict[str, str]:
    """Write the page of a run as its files tell it up to a step.

    Args:
        config: of the run.
        step: that it has come to.
        num_steps: at which it ends.
        step_samples: samples a step.

    Returns:
        The lines of advice in it, by kind.

    Raises:
        OSError: it cannot be written.
    """
    found = records.read(config.output_dir, step)
    lines = advice(found.held_out, found.curve(LOSS))
    values = {
        "title": config.output_dir.resolve().name,
        "step": step,
        "num_steps": num_steps,
        "seconds_left": _seconds_left(found, (num_steps - step) * step_samples),
        "figures": _figures(found),
        "advice": list(lines.values()),
        "charts": _charts(found),
        **_pictures(config, found),
        "settings": {
            name: value for name, value in as_dict(config).items() if value not in (None, [], False)
        },
    }
    write_text(config.output_dir / PAGE_FILE, _render(values))
    return lines


def _render(values: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("progress.html.jinja").render(values)


def _seconds_left(found: Records, samples: int) -> float | None:
    """Return how long the rest takes at the speed of late, without validations; None if unknown."""
    rates = [rate for _, rate in found.curve(RATE)][-RECENT:]
    return samples / median(rates) if rates else None


def _figures(found: Records) -> list[tuple[str, str]]:
    """Return (figure, what it is): the last of each."""
    shown = []
    for name, what in ((HELD_OUT, "held-out loss"), (AVERAGED_HELD_OUT, "… of the average")):
        steps = [step for step in sorted(found.held_out) if name in found.held_out[step]]
        if steps:
            before = found.held_out.get(0, {}).get(HELD_OUT)
            compared = f", before training {mean(before):.4f}" if before and steps[-1] else ""
            shown.append((f"{mean(found.held_out[steps[-1]][name]):.4f}", what + compared))
    for name, what in ((LOSS, "training loss"), (RATE, "samples a second")):
        if points := found.curve(name):
            recent = [value for _, value in points][-RECENT:]
            shown.append((f"{mean(recent):.4g}", f"{what}, mean of the last {len(recent)} logs"))
    return shown


def _charts(found: Records) -> list[str]:
    # matplotlib takes a second to import.
    from train.dashboard import charts

    shown = []
    means = {
        label: [
            (step, mean(losses[name])) for step, losses in found.held_out.items() if name in losses
        ]
        for name, label in ((HELD_OUT, "weights"), (AVERAGED_HELD_OUT, "their average"))
    }
    means = {label: points for label, points in means.items() if points}
    if means:
        before = found.held_out.get(0, {}).get(HELD_OUT)
        shown.append(
            charts.curves("Held-out loss", means, baseline=mean(before) if before else None)
        )
        last = max(found.held_out)
        levels = {"before training": before} if before else {}
        levels |= {f"step {last}": found.held_out[last][HELD_OUT]} if last else {}
        if AVERAGED_HELD_OUT in found.held_out[last]:
            levels[f"step {last}, average"] = found.held_out[last][AVERAGED_HELD_OUT]
        shown.append(charts.by_level("Held-out loss by noise level", levels))
    for name, title, smooth in (
        (LOSS, "Training loss", True),
        (GRADIENT_NORM, "Gradient norm", True),
        (LEARNING_RATE, "Learning rate", False),
    ):
        if points := found.curve(name):
            shown.append(charts.curves(title, {title.lower(): points}, smooth=smooth))
    return shown


def _pictures(config: TrainConfig, found: Records) -> dict[str, Any]:
    """Return the steps shown, and of each pair its prompt and its pictures as data URLs."""
    steps = sorted(found.validations)
    if len(steps) > STEPS_SHOWN:
        places = np.linspace(0, len(steps) - 1, STEPS_SHOWN).round().astype(int)
        steps = [steps[place] for place in places]
    pairs = []
    # By number; what the averaged weights drew, which begins later, after what the weights drew.
    names = {path.name for step in steps for path in found.validations[step].glob("*.png")}
    for name in sorted(names, key=lambda name: (int(name.split(".")[0].split("-")[0]), len(name))):
        drawn = [found.validations[step] / name for step in steps]
        path = next(each for each in drawn if each.is_file())
        with Image.open(path) as picture:
            prompt = str(picture.info.get(PROMPT_KEY, ""))
        if "-ema" in name:
            prompt += " (average of the weights)"
        cells = [_cell(path, 0, config), *(_cell(each, 1, config) for each in drawn)]
        pairs.append((prompt, cells))
    return {"shown_steps": steps, "pairs": pairs}


def _cell(path: Path, number: int, config: TrainConfig) -> str | None:
    """Return one of the pictures side by side in a file, as a data URL; None without the file."""
    if not path.is_file():
        return None
    with Image.open(path) as sheet:
        width = sheet.width // (1 + config.num_validation_images)
        picture = sheet.convert("RGB").crop((width * number, 0, width * (number + 1), sheet.height))
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
