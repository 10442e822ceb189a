"""`--estimate`: how much memory stage 1 takes, from the base model's configurations alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

from common.device import free_gpu_bytes
from common.memory.need import CUDA_BYTES, GB, GIB, Need
from common.options import as_arguments
from precompute.config import PrecomputeConfig
from precompute.fingerprints.encoder_spec import (
    CLIP_COMPONENTS,
    latent_settings,
    text_settings,
)
from precompute.memory.offload import fitting_offload, text_batch
from precompute.memory.simulation import (
    Offload,
    Peak,
    Sizes,
    image_peak,
    read_sizes,
    text_peaks,
)
from precompute.planning.workers import find_part
from sd3.base.find import find_base
from sd3.base.without_t5 import uses_t5

# What reduces the peak of the text pass, and of the image pass, the best first.
TEXT_REMEDIES: tuple[dict[str, Any], ...] = (
    {"offload": "groups"},
    {"text_dtype": "bfloat16"},
    {"text_batch_size": 8},
)
IMAGE_REMEDIES: tuple[dict[str, Any], ...] = ({"vae_batch_size": 1}, {"vae_dtype": "bfloat16"})


@dataclass(frozen=True)
class Estimate:
    """What a run takes; its two passes never stand on the device together.

    Attributes:
        text: peak of the text pass.
        images: peak of the image pass.
        offload: of the text encoders; what `auto` chose, if it was to choose.
        need: of the whole run.
    """

    text: Peak
    images: Peak
    offload: Offload
    need: Need


def need(config: PrecomputeConfig, free: int | None) -> Need:
    """Return the memory that a run needs, an annotator that draws on the device aside.

    Batches of `auto` count as on a device that they just fit: the usual number of prompts, and one
    image.

    Args:
        config: the settings; neither the source nor the cache is read.
        free: bytes of free device memory, by which `--offload auto` chooses; None: as on a device
            of any size.

    Raises:
        ConfigError: the base model or one of its configurations is missing.
    """
    return estimate(config, find_sizes(config), free).need


def find_sizes(config: PrecomputeConfig) -> Sizes:
    """Return the sizes of the encoders; of a base on the hub only configurations are fetched.

    Raises:
        ConfigError: the base model or one of its configurations is missing.
    """
    t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
    base = find_base(
        config.pretrained_model_name_or_path,
        [*(name for _, name in CLIP_COMPONENTS), *(["text_encoder_3"] if t5 else []), "vae"],
        revision=config.revision,
        cache_dir=config.cache_dir,
        weights=False,
        single_file_config=config.single_file_config,
    )
    return read_sizes(base, with_t5=t5)


def estimate(config: PrecomputeConfig, sizes: Sizes, free: int | None) -> Estimate:
    """Return what a run with encoders of some sizes takes; the arguments are those of `need`."""
    peaks = text_peaks(sizes, text_settings(config), text_batch(config))
    offload, chosen = config.offload, ""
    if offload == "auto":
        offload = fitting_offload(peaks, free)
        chosen = f"--offload {offload}"
    text = peaks[offload]
    images = image_peak(sizes, latent_settings(config), _image_batch(config))
    largest = max(text.total, images.total)
    return Estimate(text, images, offload, Need(largest, text.host, chosen))


def print_estimate(config: PrecomputeConfig) -> None:
    """Print what a run needs, then what would reduce it, once for all workers of a launch.

    Raises:
        ConfigError: the base model or one of its configurations is missing.
    """
    if not find_part(config.part, os.environ).leads:
        return
    free = free_gpu_bytes(config.device)
    sizes = find_sizes(config)
    found = estimate(config, sizes, free)
    for line in report(config, found, free):
        click.echo(line)
    for line in advice(config, sizes, found):  # takes a while
        click.echo(line)


def report(config: PrecomputeConfig, found: Estimate, free: int | None) -> Iterator[str]:
    """Yield what a run needs, part by part, in lines.

    Args:
        config: the settings.
        found: the estimate.
        free: bytes that are free on a GPU of this machine, if it has one.
    """
    width, height = latent_settings(config).largest_shape
    prompts, images = text_batch(config), _image_batch(config)
    needed = found.need
    yield "device memory of stage 1 in GB (10^9 bytes); its two passes follow each other:"
    t5 = "T5 layer by layer" if found.offload == "groups" else "whole"
    for weights, peak, work in (
        (f"text encoders, {t5}", found.text, f"{_count(prompts, 'prompt')} at once"),
        ("VAE", found.images, f"{_count(images, 'image')} of {width} x {height} px at once"),
    ):
        yield f"{peak.weights / GB:8.2f}  {weights}"
        yield f"{peak.activations / GB:8.2f}  {work}"
        yield f"{peak.total / GB:8.2f}  together"
    yield f"{needed.free / GB:8.2f}  must be free ({needed.free / GIB:.2f} GiB): the larger pass,"
    yield f"          a twentieth for what is lost between tensors, and CUDA's {CUDA_BYTES / GB:g}"
    if needed.host:
        yield f"{needed.host / GB:8.2f}  of host memory a process, for T5; some 2 for the program"
    if needed.chosen:
        yield f"--offload auto is {needed.chosen}{'' if free is not None else ' where it fits'}"
    if "auto" in (config.vae_batch_size, config.text_batch_size):
        yield "batches of auto grow as far as the device has room"
    if config.conditioning_from is not None:
        yield f"not counted: what --conditioning-from {config.conditioning_from} takes, before both"
    if free is not None:
        fits = "fits" if needed.fits(free) else "does not fit"
        yield f"this GPU has {free / GB:.2f} GB free ({free / GIB:.2f} GiB): {fits}"


def advice(config: PrecomputeConfig, sizes: Sizes, found: Estimate) -> list[str]:
    """Return which options would reduce a pass, and to what, in lines."""
    lines = []
    base = replace(config, offload=found.offload)
    for name, now, changes in (
        ("text", found.text, TEXT_REMEDIES),
        ("images", found.images, IMAGE_REMEDIES),
    ):
        for change in changes:
            peak = _changed(base, sizes, name, change)
            if peak.total < 0.95 * now.total:
                host = f", and {peak.host / GB:.1f} of host memory" if peak.host else ""
                lines.append(f"{peak.total / GB:8.2f}  {name} with {as_arguments(change)}{host}")
    return ["less, in GB:", *lines] if lines else ["no option would make it less"]


def _changed(config: PrecomputeConfig, sizes: Sizes, name: str, change: dict[str, Any]) -> Peak:
    """Return the peak of a pass with a changed setting."""
    changed = replace(config, **change)
    if name == "images":
        return image_peak(sizes, latent_settings(changed), _image_batch(changed))
    peaks = text_peaks(sizes, text_settings(changed), text_batch(changed))
    return peaks["groups" if changed.offload == "groups" else "none"]


def _image_batch(config: PrecomputeConfig) -> int:
    return 1 if config.vae_batch_size == "auto" else int(config.vae_batch_size)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
