"""The settings in a picture's file: all that it takes to draw it again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from xxhash import xxh3_128

from common.errors import ConfigError
from common.options import as_dict
from common.provenance import versions
from infer.config import PER_CONTROLNET, GenerateConfig
from sd3.base.lora import find_file
from sd3.pretrained import controlnet_in

KEY = "sd3_controlnet"
BLOCK_BYTES = 1 << 24
# Settings of where and how a run works. They do not change the picture.
NOT_IDENTITY = {
    "output_dir",
    "pairs",
    "cache_dir",
    "conditioning_name",
    "resolution",
    "batch_size",
    "offload",
    "compile",
    "device",
    "estimate",
}

# Settings that change nothing where the images are conditioning images, as they once always were.
OF_PHOTOGRAPHS = {"from_photo", "conditioning_from", "conditioning_args"}
# Options that came later, and what goes with each; absent where they are not given, as before.
LATER = {
    "mask": ("mask",),
    "lora": ("lora", "lora_scale"),
    "transformer": ("transformer",),
    "single_file_config": ("single_file_config",),
    "t5": ("t5",),
}
# Kinds of input files whose digests are kept, and the options that name them.
DIGESTED = {
    "images": "image",
    "controlnets": "controlnet",
    "loras": "lora",
}


def describe(
    config: GenerateConfig, digests: dict[str, list[str]], drawn: dict[str, Any], **picture: Any
) -> str:
    """Return the description that a picture's file holds, as JSON.

    Args:
        config: settings of the run.
        digests: of the input files' bytes, by kind; see `DIGESTED`.
        drawn: `device`, its type; `batch`, the picture's place in its batch and the batch's size.
        picture: settings of this picture, which replace the run's.
    """
    left_out = NOT_IDENTITY if config.from_photo else NOT_IDENTITY | OF_PHOTOGRAPHS
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, group in LATER.items():
        if getattr(config, name) == defaults[name]:
            left_out = left_out.union(group)
    settings = {name: value for name, value in as_dict(config).items() if name not in left_out}
    for name in PER_CONTROLNET:
        if len(settings[name]) == 1:  # as before there could be several
            (settings[name],) = settings[name]
    description = {
        "settings": settings | picture,
        "digests": digests,
        "drawn": drawn,
        "versions": versions(),
    }
    if files := _versions_of_files(config):
        description["versions of files"] = files
    return json.dumps(description, ensure_ascii=False, sort_keys=True)


def png_info(description: str) -> PngInfo:
    """Return the text chunk with which a PNG is saved to hold a description."""
    info = PngInfo()
    info.add_itxt(KEY, description)
    return info


def read(path: Path) -> dict[str, Any]:
    """Return the description in a picture's file.

    Raises:
        ConfigError: the file cannot be read, or holds no description.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise ConfigError(f"{path}: {reason}.") from error
    if text is None:
        raise ConfigError(f"{path}: not drawn by python -m infer generate; it says no settings.")
    try:
        description = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: its settings are damaged ({error}).") from error
    if not isinstance(description, dict) or not isinstance(description.get("settings"), dict):
        raise ConfigError(f"{path}: its settings are damaged.")
    return description


def matches(path: Path, description: str) -> bool:
    """Tell whether a file is a whole picture with this description, versions aside."""
    if not path.is_file():
        return False
    try:
        existing = read(path)
    except ConfigError:
        return False
    expected = json.loads(description)
    compared = ("settings", "digests", "drawn", "versions of files")
    return all(existing.get(name) == expected.get(name) for name in compared)


def settings_from(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a picture was drawn with, and warnings.

    A warning says why the picture may come out differently if it is drawn again.

    Raises:
        ConfigError: the file cannot be read, or holds no description.
    """
    description = read(path)
    known = {field.name for field in dataclasses.fields(GenerateConfig)} - NOT_IDENTITY
    settings = {name: value for name, value in description["settings"].items() if name in known}
    for name in PER_CONTROLNET:
        if isinstance(settings.get(name), int | float):
            settings[name] = [settings[name]]
    digests, drawn = description.get("digests", {}), description.get("drawn", {})
    warnings = []
    for kind, option in DIGESTED.items():
        for name, digest in zip(settings.get(option, []), digests.get(kind, []), strict=False):
            if Path(name).exists() and _digest_now(kind, name) != digest:
                warnings.append(f"{name} has changed since {path} was drawn.")
    for option, version in description.get("versions of files", {}).items():
        source = Path(str(settings.get(option)))
        if source.is_file() and version_of(source) != version:
            warnings.append(f"{source} has changed since {path} was drawn.")
    if drawn.get("batch", [0, 1])[1] > 1:
        warnings.append(f"{path} was drawn in a batch; alone it comes out alike, not the same.")
    # `width` and `height` hold the picture's size; a configuration's resolution must not win.
    return settings | {"resolution": None}, warnings


def _digest_now(kind: str, name: str) -> str | None:
    """Return the digest of what a setting names; None if that is no longer there."""
    try:
        return digest_of(find_file(name) if kind == "loras" else Path(name))
    except (ConfigError, OSError):
        return None


def version_of(path: Path) -> list[int]:
    """Return size and time of a file that is too large to be read for a digest."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _versions_of_files(config: GenerateConfig) -> dict[str, list[int]]:
    """Return the versions of the checkpoints that a base is made of, by their options."""
    options = ("pretrained_model_name_or_path", "transformer")
    files = {option: Path(str(getattr(config, option))) for option in options}
    return {option: version_of(file) for option, file in files.items() if file.is_file()}


def digest_of(path: Path) -> str:
    """Return the digest of a file, or of the weights and configuration in a ControlNet's folder.

    A checkpoint's folder stands for the ControlNet in it.
    """
    digest = xxh3_128()
    files = [path]
    if path.is_dir():
        folder = controlnet_in(path) or path
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for file_path in files:
        with file_path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
