"""Finding base models and ControlNets: a folder, or the needed files of a hub repository."""

import contextlib
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.atomic_files import DISK_FULL
from common.errors import ConfigError
from sd3.single_file import refuse_file, refuse_files_alone

# Entry of a ControlNet's config.json that says how its data was made. diffusers stores entries
# with a leading underscore and ignores them when it builds the model.
DATA_KEY = "_precompute"
BASE_PIPELINE = "StableDiffusion3Pipeline"
# The files beside weights that loading a component needs; nothing else is downloaded.
FILE_PATTERNS = ("*.json", "*.txt", "*.model")


def find_base(
    name_or_path: str,
    subfolders: Sequence[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
    weights: bool = True,
) -> Path:
    """Return the local folder of a base model that holds at least `subfolders`.

    Args:
        name_or_path: a diffusers model folder, or a hub id such as
            `stabilityai/stable-diffusion-3.5-medium`.
        subfolders: components that the caller needs, e.g. `("vae",)`; only these are downloaded
            from the hub.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, e.g. `fp16`, for components that have it.
        cache_dir: folder for downloads; None for the hub's default.
        weights: whether the weights are needed, or only configurations.

    Raises:
        ConfigError: neither a folder nor a hub id, no access, or components missing.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        refuse_file("base model", name_or_path, BASE_PIPELINE)
        if not is_hub_id(name_or_path):
            raise ConfigError(
                f"base model {name_or_path!r}: no such folder, and not a hub id (owner/name). "
                "Give --pretrained-model-name-or-path a diffusers model folder or a hub id."
            )
        patterns = [f"{name}/{kind}" for name in subfolders for kind in FILE_PATTERNS]
        if weights:
            patterns += _weight_patterns(name_or_path, subfolders, revision, variant)
        ignored = [] if variant else ["*.fp16*", "*.bf16*"]
        folder = _download(
            name_or_path, ["model_index.json", *patterns], ignored, revision, cache_dir
        )
    missing = [name for name in subfolders if not has_component(folder, name)]
    if missing:
        refuse_files_alone("base model", name_or_path, revision, BASE_PIPELINE)
        # Where no file matches, there is no folder either.
        present = sorted(path.name for path in folder.glob("*/"))
        raise ConfigError(
            f"base model {name_or_path!r}: no {', '.join(f'{name}/' for name in missing)} in it; "
            f"found {', '.join(f'{name}/' for name in present) or 'no folders'}. "
            "A diffusers model folder has one folder for each component."
        )
    return folder


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
        refuse_file(flag, name_or_path, None)
        if not is_hub_id(name_or_path):
            raise ConfigError(
                f"{flag} {name_or_path}: no such folder, and not a hub id (owner/name). "
                "Train one first: python -m train."
            )
        patterns = ["config.json", *(["*.safetensors", "*.index.json"] if weights else [])]
        folder = _download(name_or_path, patterns, ["*/*"], None, cache_dir)
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
        folder = _download(
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


def _weight_patterns(
    repo: str, subfolders: Sequence[str], revision: str | None, variant: str | None
) -> list[str]:
    """Return patterns of the weights to download, in the variant if a component has it."""
    from huggingface_hub import list_repo_files

    present: list[str] = []
    if variant is not None:
        # The download itself reports problems of the repository or the network better, and the
        # HTTP library's errors change with its version.
        with contextlib.suppress(Exception):
            present = list_repo_files(repo, revision=revision)
    patterns = []
    for name in subfolders:
        of_variant = f"{name}/*.{variant}*safetensors"
        has_variant = any(fnmatch.fnmatch(path, of_variant) for path in present)
        patterns.append(of_variant if has_variant else f"{name}/*.safetensors")
    return patterns


def _download(
    repo: str,
    allow_patterns: list[str],
    ignore_patterns: list[str],
    revision: str | None,
    cache_dir: Path | None,
) -> Path:
    """Return the local copy of the matching files of a hub repository.

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
