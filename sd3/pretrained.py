"""Finding ControlNets and other models: a folder, or the needed files of a hub repository."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.atomic_files import DISK_FULL
from common.errors import ConfigError
from sd3.single_file import refuse_file

# Entry of a ControlNet's config.json that says how its data was made. diffusers stores entries
# with a leading underscore and ignores them when it builds the model.
DATA_KEY = "_precompute"
# The files beside weights that loading a component needs; nothing else is downloaded.
FILE_PATTERNS = ("*.json", "*.txt", "*.model")


def has_component(folder: Path, name: str) -> bool:
    """Return whether a model folder holds a component with a configuration."""
    return any((folder / name).glob("*.json"))


def component_variant(component: Path, variant: str | None) -> str | None:
    """Return `variant` if a component has weights of it, else None for the plain weights."""
    has_it = variant is not None and any(component.glob(f"*.{variant}*safetensors"))
    return variant if has_it else None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return a component's configuration, from its `config.json` or `scheduler_config.json`.

    Raises:
        ConfigError: the file is missing or not a JSON object.
    """
    path = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def find_controlnet(
    name_or_path: str, flag: str, *, cache_dir: Path | None = None, weights: bool = True
) -> Path:
    """Return the local folder of a ControlNet.

    Args:
        name_or_path: a folder with a ControlNet's config.json and weights, a checkpoint's
            folder, which has it in `controlnet/`, or a hub id.
        flag: the option, for the error message.
        cache_dir: folder for downloads; None for the hub's default.
        weights: whether the weights are needed, or only the configuration.

    Raises:
        ConfigError: neither a folder nor a hub id, no access, or no ControlNet in it.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        refuse_file(flag, name_or_path)
        if not is_hub_id(name_or_path):
            raise ConfigError(
                f"{flag} {name_or_path}: no such folder, and not a hub id (owner/name). "
                "Train one first: python -m train."
            )
        patterns = ["config.json", *(["*.safetensors", "*.index.json"] if weights else [])]
        folder = download(name_or_path, patterns, ["*/*"], None, cache_dir)
    if found := controlnet_in(folder, weights=weights):
        return found
    checkpoints = [path.parent for path in folder.glob("checkpoint-*/controlnet")]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: (len(path.name), path.name))
        raise ConfigError(
            f"{flag} {name_or_path}: no ControlNet in it. Did you mean {newest}? "
            "So far it holds checkpoints alone."
        )
    raise ConfigError(
        f"{flag} {name_or_path}: no ControlNet in it. Train one first: python -m train."
    )


def find_model(
    name_or_path: str, flag: str, *, revision: str | None = None, cache_dir: Path | None = None
) -> Path:
    """Return the local folder of a single model, such as one that estimates depth.

    Args:
        name_or_path: a folder with a config.json and weights as safetensors, or a hub id.
        flag: the option, for the error message.
        revision: branch, tag or commit on the hub.
        cache_dir: folder for downloads; None for the hub's default.

    Raises:
        ConfigError: neither a folder nor a hub id, no access, or no model in it.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        if not is_hub_id(name_or_path):
            raise ConfigError(
                f"{flag}={name_or_path}: no such folder, and not a hub id (owner/name)."
            )
        folder = download(
            name_or_path, [*FILE_PATTERNS, "*.safetensors"], ["*/*"], revision, cache_dir
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{flag}={name_or_path}: no model in it; a config.json and weights as .safetensors "
            "are needed."
        )
    return folder


def controlnet_in(folder: Path, *, weights: bool = True) -> Path | None:
    """Return where a folder has its ControlNet: itself, or a checkpoint's `controlnet/`.

    Without `weights`, a configuration is enough.
    """
    for found in (folder, folder / "controlnet"):
        has_weights = any(found.glob("*.safetensors")) or not weights
        if (found / "config.json").is_file() and has_weights:
            return found
    return None


def largest_side(config: Mapping[str, Any]) -> int:
    """Return the largest side of latents that a transformer or a ControlNet has positions for.

    Args:
        config: its configuration.

    Raises:
        ConfigError: it is not that of an SD3 network.
    """
    try:
        return int(config["patch_size"]) * int(config["pos_embed_max_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"not the configuration of an SD3 transformer ({error!r}).") from error


def vae_factor(base: Path) -> int:
    """Return how many pixels a latent stands for, in each direction.

    Args:
        base: folder of a base model.
    """
    return int(2 ** (len(read_config(base, "vae")["block_out_channels"]) - 1))


def controlnet_mismatches(controlnet: Mapping[str, Any], base: Mapping[str, Any]) -> list[str]:
    """Return one line for each setting in which a ControlNet and a base model do not match.

    Args:
        controlnet: the ControlNet's configuration.
        base: the transformer's configuration.
    """
    names = ["in_channels", "attention_head_dim", "num_attention_heads", "pooled_projection_dim"]
    if (
        controlnet.get("joint_attention_dim") is not None
    ):  # SD3.5-large's own ControlNets take no text
        names.append("joint_attention_dim")
    return [
        f"  {name}: ControlNet {controlnet.get(name)}, base model {base.get(name)}"
        for name in names
        if controlnet.get(name) != base.get(name)
    ]


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def download(
    repo: str,
    allow_patterns: list[str],
    ignore_patterns: list[str],
    revision: str | None,
    cache_dir: Path | None,
) -> Path:
    """Return the local copy of the matching files of a hub repository.

    Args:
        repo: its id.
        allow_patterns: of the paths that are wanted.
        ignore_patterns: of those among them that are not.
        revision: branch, tag or commit.
        cache_dir: folder for downloads; None for the hub's default.

    Raises:
        ConfigError: gated, unknown or out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
            )
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo!r} is gated: accept its terms on its hub page, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo!r}: no such folder here and no such repository on the hub "
            "(or it is private: `hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{repo!r} has no revision {revision!r}.") from error
    except Exception as error:  # of huggingface_hub, and of the HTTP library beneath it
        if isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename):
            raise
        raise ConfigError(
            f"{repo!r}: no such folder here, and the hub could not be reached "
            f"({type(error).__name__}). Check the name and the network."
        ) from error
