"""The measures of a picture, and the samples that they apply to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from infer.scoring.discs import caption_colors, measure_disc, outlined_disc
from infer.scoring.edges import edge_agreement, has_lines

Values = dict[str, float | None]
# Annotators whose drawings of two pictures have nothing in common: seeded by their pixels.
RANDOM = {"mask", "strokes", "shuffle", "ContentShuffleDetector", "SamDetector"}
# An equal picture would have an infinite ratio; noise of half an 8 bit step has 54 dB.
LARGEST_PSNR_DB = 100.0


@dataclass(frozen=True)
class Sample:
    """A row to draw, its images in the picture's size.

    Attributes:
        number: the row's number, from 0.
        prompt: the caption.
        conditioning: the conditioning image; of inpainting in RGBA, the image without its mask.
        target: the row's image; None where the source has none.
        annotator: what draws the ControlNet's controls; None if it does not say.
    """

    number: int
    prompt: str
    conditioning: Image.Image
    target: Image.Image | None = None
    annotator: str | None = None


@dataclass(frozen=True)
class Measure:
    """A measure of pictures, which gives one or more values.

    Attributes:
        titles: titles of the values, by name.
        chief: name of the value by which the worst samples are found; higher is better.
        check: raises ValueError, with the reason, if the measure does not apply to a sample.
        of: returns the values of a picture.
        of_redrawn: whether `of` is called with the control that is drawn from the picture.
    """

    titles: dict[str, str]
    chief: str
    check: Callable[[Sample], None]
    of: Callable[[Image.Image, Sample], Values]
    of_redrawn: bool = False


def _check_circle(sample: Sample) -> None:
    _refuse_masked(sample)
    caption_colors(sample.prompt)
    outlined_disc(sample.conditioning)


def _measure_circle(picture: Image.Image, sample: Sample) -> Values:
    score = measure_disc(picture, sample.conditioning, *caption_colors(sample.prompt))
    return {
        "iou": score.iou,
        "disc_color_error": score.color_error,
        "background_color_error": score.background_error,
    }


def _refuse_masked(sample: Sample) -> None:
    if sample.conditioning.mode == "RGBA":
        raise ValueError("the control is the image without a part, and no drawing of lines")


def _check_lines(sample: Sample) -> None:
    _refuse_masked(sample)
    if not has_lines(sample.conditioning):
        raise ValueError("the conditioning image is no drawing of lines")


def _measure_edges(picture: Image.Image, sample: Sample) -> Values:
    return edge_agreement(picture, sample.conditioning)


def _check_target(sample: Sample) -> None:
    if sample.target is None:
        raise ValueError("the row has no image to compare with")


def _measure_target(picture: Image.Image, sample: Sample) -> Values:
    assert sample.target is not None
    psnr, ssim = _similarity(picture, sample.target)
    return {"psnr": psnr, "ssim": ssim}


def _check_redrawn(sample: Sample) -> None:
    if sample.annotator is None:
        raise ValueError(
            "the ControlNet does not say what draws its controls, and there is no "
            "--conditioning-from"
        )
    if sample.annotator in RANDOM:
        raise ValueError(
            f"what {sample.annotator} draws is random, and from another picture it is another"
        )


def _measure_redrawn(redrawn: Image.Image, sample: Sample) -> Values:
    psnr, ssim = _similarity(redrawn, sample.conditioning)
    return {"control_psnr": psnr, "control_ssim": ssim}


def _similarity(image: Image.Image, other: Image.Image) -> tuple[float, float]:
    """Return PSNR in dB and SSIM (Wang et al. 2004, IEEE TIP 13) of two RGB images of one size."""
    ours, theirs = (np.asarray(one.convert("RGB")) for one in (image, other))
    psnr = LARGEST_PSNR_DB
    if not np.array_equal(ours, theirs):
        psnr = float(peak_signal_noise_ratio(theirs, ours, data_range=255))
    return psnr, float(structural_similarity(theirs, ours, channel_axis=-1, data_range=255))


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
        _measure_circle,
    ),
    "edges": Measure(
        {
            "edge_precision": "edge precision",
            "edge_recall": "edge recall",
            "edge_f1": "edge F1",
        },
        "edge_f1",
        _check_lines,
        _measure_edges,
    ),
    "targets": Measure(
        {"psnr": "PSNR, dB", "ssim": "SSIM"}, "ssim", _check_target, _measure_target
    ),
    "redrawn": Measure(
        {"control_psnr": "control redrawn, PSNR, dB", "control_ssim": "control redrawn, SSIM"},
        "control_ssim",
        _check_redrawn,
        _measure_redrawn,
        of_redrawn=True,
    ),
}


def applicable_measures(sample: Sample) -> tuple[str, ...]:
    """Return the names of the measures that apply to a sample: for a circle, `circles` alone.

    Where edges are measured, the control is not compared pixel by pixel as well.

    Callers ask for a data set's first sample. `Measure.check` then reports samples that differ.
    """
    names = []
    for name, measure in MEASURES.items():
        try:
            measure.check(sample)
        except ValueError:
            continue
        names.append(name)
    if "circles" in names:
        return ("circles",)
    return tuple(name for name in names if name != "redrawn" or "edges" not in names)
