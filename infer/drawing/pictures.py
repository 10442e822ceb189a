"""The pictures of a run: which file each becomes, from what, and which are drawn together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from common.device import pick_device
from common.errors import ConfigError
from infer.batches import split_into_batches
from infer.config import GenerateConfig
from infer.convention import Convention
from infer.drawing import metadata
from infer.drawing.controlnet_set import ControlNetSet
from infer.drawing.from_photographs import draw_from_photographs
from infer.drawing.requests import Control, DrawRequest
from infer.photographs import Redrawing
from sd3 import images
from sd3.base.lora import find_loras
from sd3.image_files import BadImage
from sd3.inpainting import without_masked


@dataclass(frozen=True)
class Picture:
    """A picture to draw.

    Attributes:
        path: file that it becomes.
        description: what its file says of it; see `metadata.describe`.
        request: prompt and conditioning images, as they were asked for.
        seed: seed of its noise.
        size: width and height in pixels.
        controls: conditioning images, one for each ControlNet of the set.
        conventions: of these ControlNets.
    """

    path: Path
    description: str
    request: DrawRequest
    seed: int
    size: tuple[int, int]
    controls: tuple[Control, ...]
    conventions: tuple[Convention, ...]

    def fit_controls(self) -> list[Image.Image]:
        """Return the conditioning images in the picture's size; those of inpainting in RGBA.

        Raises:
            ConfigError: an image cannot be resized to it.
        """
        fitted = []
        for control, convention in zip(self.controls, self.conventions, strict=True):
            try:
                fitted.append(_fitted(control, convention, self.size))
            except BadImage as error:
                raise ConfigError(f"{control.where} {control.path}: {error}.") from error
        return fitted


def _shown(control: Control, convention: Convention) -> Image.Image:
    """Return the image of a control, whose shape the picture takes."""
    return (
        control.picture_and_mask(convention)[0]
        if convention.inpainting
        else control.image(convention)
    )


def _fitted(control: Control, convention: Convention, size: tuple[int, int]) -> Image.Image:
    """Return a control in a picture's size.

    Raises:
        BadImage: it cannot be resized to it, or its mask has another shape.
    """
    if not convention.inpainting:
        return images.fit(control.image(convention), size)
    picture, mask = control.picture_and_mask(convention)
    return without_masked(images.fit(picture, size), images.fit(mask, size, like=picture.size))


def plan_pictures(
    config: GenerateConfig,
    controlnets: ControlNetSet,
    requests: Sequence[DrawRequest],
    *,
    title_in_name: bool,
    redrawings: Sequence[Redrawing] = (),
) -> list[Picture]:
    """Return the pictures that a set of ControlNets draws, in order.

    Args:
        config: settings of the run.
        controlnets: the set.
        requests: what to draw.
        title_in_name: whether files are named for the set; needed where several sets draw.
        redrawings: for each ControlNet of the set what draws its controls from the requests'
            images, which are photographs then; empty if these are conditioning images. What is
            drawn is saved beside the pictures.

    Raises:
        ConfigError: a conditioning image cannot be used, or is one too many or too few; or a LoRA
            cannot be used.
    """
    _check_masks(controlnets, requests, from_photo=bool(redrawings))
    loras = find_loras(config.lora, config.lora_scale, config.cache_dir)
    several_seeds = any(len(request.seeds) > 1 for request in requests)
    title = f"-{controlnets.title}" if title_in_name else ""
    convention = controlnets.convention
    controls_of = [_controls_of(request, len(controlnets.folders)) for request in requests]
    if redrawings:
        folder = config.output_dir
        controls_of = draw_from_photographs(controlnets, controls_of, redrawings, folder, title)
    pictures = []
    for number, (request, controls) in enumerate(zip(requests, controls_of, strict=True)):
        size = convention.picture_size(_shown(controls[0], convention))
        for seed in request.seeds:
            name = f"{number:03d}"
            name += f"-seed{seed}" if several_seeds else ""
            path = config.output_dir / f"{name}{title}.png"
            pictures.append(
                Picture(path, "", request, seed, size, controls, controlnets.conventions)
            )
        pictures[-1].fit_controls()  # fails now, before anything is loaded
    run_digests = {
        "annotators": [redrawing.digest for redrawing in redrawings],
        "loras": [metadata.digest_of(lora.path) for lora in loras],
    }
    return [
        replace(
            picture,
            description=_describe(config, controlnets, picture, [place, len(batch)], run_digests),
        )
        for batch in batch_pictures(pictures, config.batch_size)
        for place, picture in enumerate(batch)
    ]


def _check_masks(
    controlnets: ControlNetSet, requests: Sequence[DrawRequest], *, from_photo: bool
) -> None:
    """Check that there are masks where the ControlNets take them, and not elsewhere.

    Raises:
        ConfigError: naming the option.
    """
    if controlnets.convention.inpainting and from_photo:
        raise ConfigError(
            f"--from-photo: {controlnets.names[0]} is for inpainting, and you say what is to be "
            "drawn anew: give --mask, or images with a transparent part."
        )
    masks = [control.mask for request in requests for control in request.controls if control.mask]
    if masks and not controlnets.convention.inpainting:
        raise ConfigError(
            f"--mask {masks[0]}: {controlnets.names[0]} is not for inpainting; leave it out."
        )


def _controls_of(request: DrawRequest, count: int) -> tuple[Control, ...]:
    """Return a request's conditioning images, one for each ControlNet.

    Raises:
        ConfigError: there are several images, and not as many as ControlNets.
    """
    controls = request.controls * (count if len(request.controls) == 1 else 1)
    if len(controls) != count:
        raise ConfigError(
            f"{len(controls)} conditioning images for {count} ControlNets, "
            f"{controls[0].path} first: give one for each, or one for all."
        )
    return controls


def batch_pictures(pictures: Sequence[Picture], batch_size: int) -> list[list[Picture]]:
    """Return the pictures that are drawn together, in order."""
    return split_into_batches(pictures, lambda picture: picture.size, batch_size)


def _describe(
    config: GenerateConfig,
    controlnets: ControlNetSet,
    picture: Picture,
    batch: list[int],
    run_digests: dict[str, list[str]],
) -> str:
    """Return what a picture's file says of it; `batch` is its place and the batch's size."""
    request = picture.request
    masked = [control for control in request.controls if control.mask]
    masks = [str(control.mask.absolute()) for control in masked if control.mask]
    return metadata.describe(
        config,
        {
            "images": [control.digest for control in request.controls],
            **({"masks": [control.mask_digest for control in masked]} if masked else {}),
            "controlnets": list(controlnets.digests),
            **{kind: digests for kind, digests in run_digests.items() if digests},
        },
        {"device": pick_device(config.device).type, "batch": batch},
        controlnet=list(controlnets.names),
        prompt=[request.prompt],
        negative_prompt=request.negative_prompt,
        image=[str(control.path.absolute()) for control in request.controls],
        **({"mask": masks} if masks else {}),
        seed=[picture.seed],
        width=picture.size[0],
        height=picture.size[1],
        max_sequence_length=controlnets.convention.max_sequence_length,
    )
