"""Conditioning images drawn from the photographs of requests, kept as files beside the pictures."""

from collections.abc import Sequence
from pathlib import Path

from infer.drawing.controlnet_set import ControlNetSet
from infer.drawing.requests import Control, load_control
from infer.photographs import Photograph, Redrawing, draw_controls
from sd3.contact_sheet import save_png


def draw_from_photographs(
    controlnets: ControlNetSet,
    photographs: Sequence[tuple[Control, ...]],
    redrawings: Sequence[Redrawing],
    folder: Path,
    ending: str,
) -> list[tuple[Control, ...]]:
    """Return the conditioning images of requests, each drawn in the size of its picture.

    Each photograph is drawn from once for each ControlNet, whose annotators are loaded in turn.

    Args:
        controlnets: the set.
        photographs: of each request, one for each ControlNet of the set.
        redrawings: for each ControlNet, what draws its controls.
        folder: for the files, `conditioning-000.png` and so on.
        ending: of the files' names, before the suffix.

    Raises:
        ConfigError: a photograph cannot be decoded, or nothing can be drawn from it.
        RunError: the device's memory is full.
        OSError: a file cannot be written.
    """
    convention = controlnets.convention
    first = dict.fromkeys(row[0] for row in photographs)
    sizes = {photo: convention.picture_size(photo.photograph(convention)) for photo in first}
    columns = []
    for number, redrawing in enumerate(redrawings):
        own = controlnets.conventions[number]
        wanted = [(row[number], sizes[row[0]]) for row in photographs]
        distinct = list(dict.fromkeys(wanted))
        controls = draw_controls(
            redrawing.open(),
            (
                Photograph(f"{photo.where} {photo.path}", photo.photograph(own), size)
                for photo, size in distinct
            ),
        )
        files = {}
        which = f"-{number}" if len(redrawings) > 1 else ""
        for place, (key, control) in enumerate(zip(distinct, controls, strict=True)):
            path = folder / f"conditioning-{place:03d}{which}{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, control)
            files[key] = load_control(path, key[0].where, is_ready=True)
        columns.append([files[key] for key in wanted])
    return list(zip(*columns, strict=True))
