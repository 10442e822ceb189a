"""Measuring controls of any kind: they are drawn again, from the pictures, and compared."""

from collections.abc import Sequence

import click
from PIL import Image

from common.errors import ConfigError
from infer.config import ScoreConfig
from infer.convention import Convention
from infer.photographs import Redrawing, draw_controls, find_redrawing
from infer.scoring.measures import Measure
from infer.scoring.results import SampleResult


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

    Raises:
        ConfigError: from a picture nothing can be drawn.
        RunError: the device's memory is full.
    """
    measures = [measure for measure in measures if measure.of_redrawn]
    if not measures or redrawing is None:
        return
    drawing = redrawing.open()
    for result in results:
        for variant, path in result.pictures.items():
            with Image.open(path) as picture:
                named = [(str(path), picture.convert("RGB"))]
            (control,) = draw_controls(drawing, named, result.sample.conditioning.size)
            for measure in measures:
                result.values[variant] |= measure.of(control, result.sample)
