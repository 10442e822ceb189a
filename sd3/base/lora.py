"""LoRAs of SD3, merged into the base's weights where these are loaded.

diffusers and peft read and merge them, as `load_lora_weights` and `fuse_lora` do: W + scale x
alpha / rank x up x down. Nothing of them is left in the model.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.checks import for_each
from common.errors import ConfigError
from sd3.base.lora_names import in_diffusers_names, is_of_published_names
from sd3.pretrained import download, is_hub_id

FLAG = "--lora"
USUAL_FILE = "pytorch_lora_weights.safetensors"  # as diffusers and its trainers name it
COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
ADAPTER = "merged"
# Parts of names, of kinds of adapters that would be merged wrongly or only in part.
OTHER_KINDS = {"dora_scale": "DoRA", "magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}


@dataclass(frozen=True)
class Lora:
    """A LoRA to merge.

    Attributes:
        path: its file.
        scale: its strength.
        components: what of a base it changes: `transformer`, `text_encoder`, `text_encoder_2`.
    """

    path: Path
    scale: float
    components: frozenset[str]

    @property
    def name(self) -> str:
        """Its file's name and its strength, as caches note them."""
        return f"{self.path.name} at {self.scale:g}"

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder."""
        return bool(self.components - {"transformer"})


def find_loras(
    names: Sequence[str], scales: Sequence[float], cache_dir: Path | None = None
) -> list[Lora]:
    """Return LoRAs, found and looked at; only the names of their weights are read.

    Args:
        names: files, folders or hub ids.
        scales: one for all, or one for each.
        cache_dir: folder for downloads; None for the hub's default.

    Raises:
        ConfigError: one cannot be found or merged, the scales do not fit, or peft is missing.
    """
    if not names:
        if tuple(scales) != (1.0,):
            raise ConfigError(f"{FLAG}-scale {scales[0]:g}: there is no {FLAG}.")
        return []
    if len(scales) not in (1, len(names)):
        raise ConfigError(
            f"{FLAG}-scale: {len(scales)} for {len(names)} {FLAG}; give one, or one for each."
        )
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{FLAG}: peft is not installed: pip install '.[lora]'")
    paths = [find_file(name, cache_dir) for name in names]
    each = zip(paths, for_each(scales, len(names)), strict=True)
    return [Lora(path, scale, _components(path)) for path, scale in each]


def say_text_is_cached(loras: Sequence[Lora], merged: Sequence[str] = ()) -> None:
    """Print which LoRAs change text encoders, where a cache has the embeddings of prompts.

    Args:
        loras: of a run.
        merged: names of those that the cache was made with.
    """
    for lora in loras:
        if lora.changes_text and lora.name not in merged:
            alone = "" if "transformer" in lora.components else ", and nothing else is in it"
            click.echo(
                f"{FLAG} {lora.path}: prompts come from the cache; only precompute {FLAG} merges "
                f"its part for the text encoders{alone}",
                err=True,
            )


def merge_loras(model: Any, component: str, loras: Sequence[Lora]) -> None:
    """Merge LoRAs into a model's weights, in place and in its number format.

    Args:
        model: a base's transformer or text encoder, not quantised.
        component: which.
        loras: those that do not change it are passed over.

    Raises:
        ConfigError: one was made for another model.
    """
    for lora in loras:
        if component in lora.components:
            _merge(model, component, lora)


def _merge(model: Any, component: str, lora: Lora) -> None:
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    weights, metadata = _read(lora.path)
    known = {name for name, _ in model.named_modules()}
    changed = {name.removeprefix(f"{component}.") for name in _modules(weights, component)}
    if unknown := sorted(changed - known):
        raise ConfigError(
            f"{FLAG} {lora.path}: made for another model: this {component} has no {unknown[0]}"
            + (f", and {len(unknown) - 1} more" if unknown[1:] else "")
            + "."
        )
    settings = {"adapter_name": ADAPTER, "metadata": metadata}
    try:
        if component == "transformer":
            StableDiffusion3Pipeline.load_lora_into_transformer(weights, model, **settings)
        else:
            StableDiffusion3Pipeline.load_lora_into_text_encoder(
                weights, None, model, prefix=component, **settings
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().rpartition("\n")[2].strip()
        raise ConfigError(f"{FLAG} {lora.path}: does not fit this {component}: {reason}") from error
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scale_layer(lora.scale)
            layer.merge()
    recurse_remove_peft_layers(model)
    del model.peft_config
    model._hf_peft_config_loaded = False


def find_file(name: str, cache_dir: Path | None = None) -> Path:
    """Return the file of a LoRA.

    Args:
        name: a file, a folder or a hub id.
        cache_dir: folder for downloads; None for the hub's default.

    Raises:
        ConfigError: there is none, or several.
    """
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        if not is_hub_id(name) or path.suffix:
            raise ConfigError(f"{FLAG} {name}: no such file or folder, and not a hub id.")
        path = download(name, ["*.safetensors"], ["*/*"], None, cache_dir)
    found = sorted(path.glob("*.safetensors"))
    usual = [file for file in found if file.name == USUAL_FILE]
    if len(usual or found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise ConfigError(
            f"{FLAG} {name}: one .safetensors file is needed, found {names}. Give the file itself."
        )
    return (usual or found)[0]


def reads_as_it_is(path: Path) -> bool:
    """Return whether diffusers reads a LoRA's file: not one of kohya's names, or with alphas."""
    names = _names(path)
    return not is_of_published_names(names) and not any(n.endswith(".alpha") for n in names)


def _names(path: Path) -> list[str]:
    """Return the names of a LoRA's weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{FLAG} {path}: cannot be read as safetensors ({error}).") from error


def _components(path: Path) -> frozenset[str]:
    """Return what a LoRA changes, from the names of its weights."""
    names = _names(path)
    for part, kind in OTHER_KINDS.items():
        if any(part in name for name in names):
            raise ConfigError(
                f"{FLAG} {path}: a {kind}, not a plain LoRA; only that is merged here."
            )
    if is_of_published_names(names):
        names = list(in_diffusers_names(load_file(path), path))
    found = {name.partition(".")[0] for name in names}
    if not found or not found <= set(COMPONENTS) or not any("lora" in name for name in names):
        strange = next((n for n in names if n.partition(".")[0] not in COMPONENTS), "no weights")
        raise ConfigError(
            f"{FLAG} {path}: no LoRA of SD3: its weights are for {', '.join(COMPONENTS)} or, as "
            f"kohya's scripts name them, lora_unet_joint_blocks_...; found {strange}."
        )
    return frozenset(found)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return a LoRA's weights under diffusers' names, and what diffusers saved of its settings."""
    from diffusers import StableDiffusion3Pipeline

    if is_of_published_names(_names(path)):
        return in_diffusers_names(load_file(path), path), None
    weights, metadata = StableDiffusion3Pipeline.lora_state_dict(
        str(path), return_lora_metadata=True
    )
    alphas = {name: weights.pop(name) for name in list(weights) if name.endswith(".alpha")}
    for name, alpha in alphas.items():  # diffusers refuses them; others write them
        module = name.removesuffix(".alpha")
        for up in (f"{module}.{ending}.weight" for ending in ("lora_B", "lora_up", "lora.up")):
            if up in weights:
                weights[up] = (weights[up].float() * float(alpha) / weights[up].shape[1]).to(
                    weights[up].dtype
                )
    return weights, None if alphas else metadata


def _modules(weights: Mapping[str, Tensor], component: str) -> set[str]:
    """Return the modules that weights change, of `<module>.lora_A.weight` and older names."""
    return {
        re.split(r"\.lora[._]", name)[0] for name in weights if name.startswith(f"{component}.")
    }
