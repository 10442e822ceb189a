"""The settings in a picture's file: all that it takes to draw it again."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infer.config import GenerateConfig
from shards.errors import ConfigError
from shards.options import as_dict
from shards.provenance import versions

KEY = "sd3_controlnet"
# Where and how a picture was made, which does not change what it is.
BESIDE_THE_POINT = {
    "output_dir",
    "pairs",
    "cache_dir",
    "conditioning_name",
    "resolution",
    "batch_size",
    "offload",
    "compile",
    "device",
}


def describe(config: GenerateConfig, digests: dict[str, list[str]], **picture: Any) -> str:
    """Return what a picture's file says of it, as JSON.

    Args:
        config: of the run.
        digests: of the bytes of what it was drawn from, by what they are.
        picture: settings that are this picture's own.
    """
    settings = {
        name: value for name, value in as_dict(config).items() if name not in BESIDE_THE_POINT
    }
    about = {"settings": settings | picture, "digests": digests, "versions": versions()}
    return json.dumps(about, ensure_ascii=False, sort_keys=True)


def info(about: str) -> PngInfo:
    """Return what a PNG is saved with to say this."""
    found = PngInfo()
    found.add_itxt(KEY, about)
    return found


def read(path: Path) -> dict[str, Any]:
    """Return what a picture's file says of it.

    Raises:
        ConfigError: it cannot be read, or says nothing.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(KEY)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or 'not a readable image'}.") from error
    if text is None:
        raise ConfigError(f"{path}: not drawn by python -m infer generate; it says no settings.")
    try:
        about = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: its settings are damaged ({error}).") from error
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
        raise ConfigError(f"{path}: its settings are damaged.")
    return about


def says(path: Path, about: str) -> bool:
    """Tell whether a whole picture is there that says this of itself, versions aside."""
    if not path.is_file():
        return False
    try:
        there = read(path)
    except ConfigError:
        return False
    wanted = json.loads(about)
    return all(there.get(name) == wanted[name] for name in ("settings", "digests"))
