"""Depth by the models of transformers, drawn as its depth-estimation pipeline draws it.

Axes: H x W pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import ConfigError
from sd3.annotators.annotator import Annotator, DrawBatch
from sd3.annotators.arguments import arguments_text, bind_arguments
from sd3.pretrained import find_model

DEPTH = "depth"
FLAG = "--conditioning-args model"
# Small, under Apache-2.0, and of relative depth: near is bright, as ControlNets are used to.
MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
# Pictures that a GPU takes at a time. It always takes so many: kernels are chosen by the size of a
# batch and round otherwise. On a CPU nothing is gained by more than one.
GPU_BATCH = 8


def find_depth(given: Mapping[str, Any], cache_dir: Path | None) -> Annotator:
    """Return the annotator of depth.

    Args:
        given: its arguments; see `draw`.
        cache_dir: folder for downloads; None for the hub's default.

    Raises:
        ConfigError: an argument is wrong, or there is no such model.
    """
    arguments = bind_arguments(DEPTH, _settings, given, num_images=0)
    folder = find_model(
        str(arguments["model"]), FLAG, revision=arguments["revision"] or None, cache_dir=cache_dir
    )
    _check(folder, str(arguments["model"]))
    return Annotator(
        name=DEPTH,
        arguments=arguments,
        load=partial(_load, folder, bool(arguments["invert"])),
        identity=[DEPTH, arguments_text({"invert": arguments["invert"]})],
        models=[folder],
    )


def _settings(model: str = MODEL, revision: str = "", invert: bool = False) -> None:
    """What a user may set: a folder or a hub id, its branch or tag, and whether far is bright."""


def _check(folder: Path, name: str) -> None:
    """Refuse a model that estimates no depth.

    Raises:
        ConfigError: naming what it is.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES

    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except (OSError, ValueError) as error:
        raise ConfigError(f"{FLAG}={name}: {str(error).splitlines()[0]}") from error
    if kind not in MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES:
        raise ConfigError(f"{FLAG}={name}: estimates no depth, it is of type {kind!r}.")
    if not (folder / "preprocessor_config.json").is_file():
        raise ConfigError(f"{FLAG}={name}: no preprocessor_config.json in it.")


def _load(folder: Path, invert: bool, device: str) -> DrawBatch:
    """Return what draws the depth of pictures with the model in a folder."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    # Pillow resizes alike with torchvision and without.
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True)
    model = model.float().eval().to(device)
    size = GPU_BATCH if device.startswith("cuda") else 1

    def draw(images: Sequence[Image.Image]) -> list[Image.Image]:
        drawn: list[Image.Image] = []
        for start in range(0, len(images), size):
            batch = list(images[start : start + size])
            filled = [*batch, *[batch[-1]] * (size - len(batch))]
            drawn += _depths(processor, model, device, filled, invert)[: len(batch)]
        return drawn

    return draw


def _depths(
    processor: Any, model: Any, device: str, images: Sequence[Image.Image], invert: bool
) -> list[Image.Image]:
    """Return the depths of pictures of one size."""
    import torch

    inputs = processor(images=list(images), return_tensors="pt").to(device)
    with torch.no_grad(), _full_precision():
        outputs = model(**inputs)
        # By position: some models' processors call it source_sizes.
        found = processor.post_process_depth_estimation(
            outputs, [(image.height, image.width) for image in images]
        )
    return [_to_image(one["predicted_depth"].cpu().numpy(), invert) for one in found]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Compute in float32 proper, whatever the encoders' setting: inference must draw the same."""
    import torch

    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def _to_image(depth: Any, invert: bool) -> Image.Image:
    """Return depth [H, W] as grey values from the least, black, to the greatest, white."""
    least, most = depth.min(), depth.max()
    if not np.isfinite([least, most]).all():
        raise ValueError("the depth is not finite")
    unit = (depth - least) / (most - least) if most > least else np.zeros_like(depth)
    grey = (unit * 255).astype(np.uint8)
    return Image.fromarray(255 - grey if invert else grey).convert("RGB")
