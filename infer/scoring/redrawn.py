"""Measuring controls of any kind: they are drawn again, from the pictures, and compared."""

from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image

from common.errors import ConfigError
from infer.config import ScoreConfig
from infer.convention import Convention
from infer.photographs import Redrawing, find_redrawing
from infer.scoring.measures import Measure
from infer.scoring.results import SampleResult
from sd3.image_files import BadImage

# Pictures without a control that are named.
MOST_NAMED = 3


def find_redrawings(config: ScoreConfig, conventions: Sequence[Convention]) -> Redrawing | None:
    """Return what draws the ControlNets' controls, the same for all; None if nothing says so.

    Raises:
        ConfigError: it is needed and not to be had, or differs between the ControlNets.
    """
    needs_it = config.from_photo or "redrawn" in config.measure
    found: list[Redrawing] = []
    for name, convention in zip(config.controlnet, conventions, strict=True):
        if needs_it or convention.annotator is not None or config.conditioning_from is not None:
            try:
                found.append(find_redrawing(config, name, convention))
            except ConfigError as error:  # a package or a file that this machine lacks
                if needs_it or config.conditioning_from is not None:
                    raise
                click.echo(f"controls are not drawn again to be measured: {error}", err=True)
                return None
    if needs_it and len({redrawing.digest for redrawing in found}) > 1:
        raise ConfigError(
            "--controlnet: these were trained on controls that are drawn in different ways, so one "
            "score does not compare them; score each alone."
        )
    same = len(found) == len(conventions) and len({one.digest for one in found}) == 1
    return found[0] if same else None


def measure_redrawn(
    measures: Sequence[Measure], results: Sequence[SampleResult], redrawing: Redrawing | None
) -> None:
    """Add the values of the measures that compare controls to the results.

    A picture from which nothing can be drawn keeps the value None; it is counted and named.

    Raises:
        ConfigError: the annotator cannot be loaded.
        RunError: the device's memory is full.
    """
    measures = [measure for measure in measures if measure.of_redrawn]
    if not measures or redrawing is None:
        return
    drawn_from = [
        (result, variant, path) for result in results for variant, path in result.pictures.items()
    ]
    controls = redrawing.open().draw_all(_open(path) for _, _, path in drawn_from)
    failed = []
    for (result, variant, path), control in zip(drawn_from, controls, strict=True):
        if isinstance(control, BadImage):
            failed.append(f"{path}: {control}")
            continue
        for measure in measures:
            result.values[variant] |= measure.of(control, result.sample)
    if failed:
        first = "; ".join([*failed[:MOST_NAMED], *(["…"] if len(failed) > MOST_NAMED else [])])
        click.echo(
            f"{len(failed)} of {len(drawn_from)} pictures have no control to compare: {first}",
            err=True,
        )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
