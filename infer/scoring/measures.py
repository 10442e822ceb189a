"""What can be measured of a picture, and of which data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from infer.scoring.discs import caption_colors, measure, outlined_disc
from infer.scoring.edges import edge_agreement, has_lines

Values = dict[str, float | None]
# An equal picture's peak signal-to-noise ratio would be infinite; half a step of 8 bit noise is 54.
MOST_PSNR = 100.0


@dataclass(frozen=True)
class Sample:
    """A row to draw.

    Attributes:
        number: from 0.
        prompt: its caption.
        conditioning: its conditioning image, of the picture's size.
        target: its image, likewise; None where the source has none.
    """

    number: int
    prompt: str
    conditioning: Image.Image
    target: Image.Image | None = None


@dataclass(frozen=True)
class Measure:
    """Something to measure.

    Attributes:
        titles: of its figures, by name.
        chief: the figure by which the worst are found; a higher one is better.
        check: raises ValueError, saying why, if a sample cannot be measured so.
        of: returns the figures of a picture.
    """

    titles: dict[str, str]
    chief: str
    check: Callable[[Sample], None]
    of: Callable[[Image.Image, Sample], Values]


def _check_circle(sample: Sample) -> None:
    caption_colors(sample.prompt)
    outlined_disc(sample.conditioning)


def _circles(picture: Image.Image, sample: Sample) -> Values:
    found = measure(picture, sample.conditioning, *caption_colors(sample.prompt))
    return {
        "iou": found.iou,
        "disc_color_error": found.color_error,
        "background_color_error": found.background_error,
    }


def _check_lines(sample: Sample) -> None:
    if not has_lines(sample.conditioning):
        raise ValueError("the conditioning image is no drawing of lines")


def _edges(picture: Image.Image, sample: Sample) -> Values:
    return edge_agreement(picture, sample.conditioning)


def _check_target(sample: Sample) -> None:
    if sample.target is None:
        raise ValueError("the row has no image to compare with")


def _targets(picture: Image.Image, sample: Sample) -> Values:
    assert sample.target is not None
    one, other = (np.asarray(image.convert("RGB")) for image in (picture, sample.target))
    same = np.array_equal(one, other)
    return {
        "psnr": MOST_PSNR if same else float(peak_signal_noise_ratio(other, one, data_range=255)),
        "ssim": float(structural_similarity(other, one, channel_axis=-1, data_range=255)),
    }


MEASURES: dict[str, Measure] = {
    # Intersection over union of the disc and its outline; CIEDE2000 to the caption's colours.
    "circles": Measure(
        {
            "iou": "IoU",
            "disc_color_error": "disc colour, CIEDE2000",
            "background_color_error": "background, CIEDE2000",
        },
        "iou",
        _check_circle,
        _circles,
    ),
    "edges": Measure(
        {
            "edge_precision": "edge precision",
            "edge_recall": "edge recall",
            "edge_f1": "edge F1",
        },
        "edge_f1",
        _check_lines,
        _edges,
    ),
    # Structural similarity: Wang et al. 2004, IEEE TIP 13.
    "targets": Measure({"psnr": "PSNR, dB", "ssim": "SSIM"}, "ssim", _check_target, _targets),
}


def fitting(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return the measures that a data set's first sample can have: circles alone where it is one.

    Where the first is one and another is not, that is for the user to know; see `Measure.check`.
    """
    fits = []
    for name, one in MEASURES.items():
        try:
            one.check(samples[0])
        except ValueError:
            continue
        fits.append(name)
    return ("circles",) if "circles" in fits else tuple(fits)
