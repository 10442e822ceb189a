"""A ControlNet as one file, for ComfyUI's `models/controlnet`."""

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import SD3ControlNetModel
from safetensors.torch import save_file
from torch import Tensor

from common.atomic_files import give_usual_permissions, move_into_place, require_space
from common.errors import ConfigError
from infer.config import ExportConfig
from infer.exporting.comfyui import base_blocks, why_driven_wrongly, without_shift
from sd3.controlnet.unsaved_convention import corrected
from sd3.finite import check_finite, nonfinite_weight
from sd3.pretrained import DATA_KEY, find_controlnet, read_config

FP8 = "float8_e4m3fn"
# By the blocks of the base; SD3.5-medium is told from SD3-medium by its second attentions.
BASES = {24: "stable-diffusion-3-medium", 38: "stable-diffusion-3.5-large"}
DUAL = "stable-diffusion-3.5-medium"


def export(config: ExportConfig) -> None:
    """Write a ControlNet as one file that ComfyUI drives as it was trained.

    Raises:
        ConfigError: it cannot be found, ComfyUI cannot drive it rightly, a weight does not fit the
            number format, or the file is there.
        OSError: the file cannot be written.
    """
    if config.output.is_dir():
        raise ConfigError(f"--output {config.output}: a folder, and a file's name is needed.")
    if config.output.exists() and not config.overwrite:
        raise ConfigError(f"--output {config.output}: is there already; --overwrite replaces it.")
    folder = find_controlnet(config.controlnet, "--controlnet", cache_dir=config.cache_dir)
    saved = corrected(read_config(folder, ""), config.convention)
    if why := why_driven_wrongly(saved, config.controlnet):
        given = f"--controlnet {config.controlnet}"
        raise ConfigError(f"{given}: ComfyUI would drive it wrongly: {why}.")
    controlnet = SD3ControlNetModel.from_pretrained(folder, dtype=torch.float32)
    check_finite(controlnet, f"--controlnet {folder}")
    weights = without_shift(dict(controlnet.state_dict()), saved)
    stored = {
        name: in_format(name, tensor, config.dtype).contiguous() for name, tensor in weights.items()
    }
    if (name := nonfinite_weight(stored.items())) is not None:
        raise ConfigError(f"--dtype {config.dtype}: the weight {name} does not fit; try bfloat16.")
    write(config.output, stored, metadata(config.output.stem, saved))
    size = config.output.stat().st_size / 1e9
    click.echo(f"{config.output}: {size:.2f} GB in {config.dtype}, for ComfyUI's models/controlnet")


def in_format(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """Return a weight in a file's number format.

    In 8 bit are the matrices of the blocks alone; what is small stays in 16.
    """
    if dtype == FP8:
        is_matrix = tensor.ndim == 2 and name.startswith(("transformer_blocks.", "controlnet_bl"))
        return tensor.to(torch.float8_e4m3fn if is_matrix else torch.float16)
    return tensor.to(getattr(torch, dtype))


def metadata(title: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file says of itself, as Stability's ModelSpec 1.0 names it.

    Args:
        title: of the model.
        config: the ControlNet's configuration.
    """
    base = DUAL if config.get("dual_attention_layers") else BASES.get(base_blocks(config), "sd3")
    data = config.get(DATA_KEY) or {}
    size = {}
    if "width" in data and "height" in data:
        size = {"modelspec.resolution": f"{data['width']}x{data['height']}"}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base}/controlnet",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        **size,
        "controlnet_config": json.dumps(dict(config), sort_keys=True),
    }


def write(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, sum(weight.nbytes for weight in weights.values()))
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        save_file(weights, temporary, {"format": "pt", **about})
        give_usual_permissions(temporary)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
