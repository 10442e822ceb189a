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
from infer.config import GenerateConfig

KEY = "sd3_controlnet"
BLOCK_BYTES = 1 << 24
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


def describe(
    config: GenerateConfig, digests: dict[str, list[str]], drawn: dict[str, Any], **picture: Any
) -> str:
    """Return what a picture's file says of it, as JSON.

    Args:
        config: of the run.
        digests: of the bytes of what it was drawn from, by what they are.
        drawn: how: on what device, and at which place of a batch of how many.
        picture: settings that are this picture's own.
    """
    settings = {
        name: value for name, value in as_dict(config).items() if name not in BESIDE_THE_POINT
    }
    about = {
        "settings": settings | picture,
        "digests": digests,
        "drawn": drawn,
        "versions": versions(),
    }
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
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise ConfigError(f"{path}: {reason}.") from error
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
    return all(there.get(name) == wanted[name] for name in ("settings", "digests", "drawn"))


def like(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that a picture was drawn with, and why it may come out otherwise now.

    Raises:
        ConfigError: see `read`.
    """
    about = read(path)
    known = {field.name for field in dataclasses.fields(GenerateConfig)} - BESIDE_THE_POINT
    settings = {name: value for name, value in about["settings"].items() if name in known}
    digests, drawn = about.get("digests", {}), about.get("drawn", {})
    warnings = []
    for kind, option in (("images", "image"), ("controlnets", "controlnet")):
        for name, digest in zip(settings.get(option, []), digests.get(kind, []), strict=False):
            place = Path(name)
            if place.exists() and digest_of(place) != digest:
                warnings.append(f"{name} has changed since {path} was drawn.")
    if drawn.get("batch", [0, 1])[1] > 1:
        warnings.append(f"{path} was drawn in a batch; alone it comes out alike, not the same.")
    # The picture's own size, whatever a configuration says.
    return settings | {"resolution": None}, warnings


def digest_of(place: Path) -> str:
    """Return the digest of a file, or of a ControlNet's folder: weights and configuration."""
    digest = xxh3_128()
    paths = [place]
    if place.is_dir():
        paths = [place / "config.json", *sorted(place.glob("*.safetensors"))]
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
