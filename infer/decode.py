"""Decodes the latents that training saved with `--validation-decode latents`."""

from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.device import pick_device
from common.errors import ConfigError
from infer.config import DecodeConfig
from sd3.base.find import find_base
from sd3.contact_sheet import save_png
from sd3.vae_decoder import decode, to_bytes

NAMES = {"latents", "conditioning_image"}


def decode_validations(config: DecodeConfig) -> None:
    """Write a PNG beside each file of validation latents that has none.

    Raises:
        ConfigError: there are no files, one is damaged, or the base model cannot be used.
        OSError: a picture cannot be written; finished ones are kept.
    """
    files = sorted((config.output_dir / "validation").glob("step-*/*.safetensors"))
    if not files:
        raise ConfigError(
            f"--output-dir {config.output_dir}: no validation/step-*/*.safetensors in it; train "
            "writes them with --validation-decode latents."
        )
    undecoded = [path for path in files if not path.with_suffix(".png").is_file()]
    click.echo(f"{len(files)} files of latents, {len(undecoded)} to decode")
    device = pick_device(config.device)
    base = find_base(
        config.pretrained_model_name_or_path,
        ("vae",),
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        single_file_config=config.single_file_config,
    )
    contents = [_read(path) for path in undecoded]
    latents = [tensors["latents"] for tensors in contents]
    pixels = decode(base, config.variant, latents, device) if undecoded else []
    for path, tensors, images in zip(undecoded, contents, pixels, strict=True):
        conditioning = tensors["conditioning_image"].permute(1, 2, 0).numpy()
        picture = path.with_suffix(".png")
        row = np.concatenate([conditioning, *to_bytes(images)], axis=1)
        save_png(picture, Image.fromarray(row))
        click.echo(picture)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"{path}: damaged ({error}).") from error
    if tensors.keys() != NAMES:
        raise ConfigError(f"{path}: holds {sorted(tensors)}, not {sorted(NAMES)}.")
    return tensors
