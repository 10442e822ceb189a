"""Requests to draw: prompts and conditioning images from options, files, folders or a cache."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from xxhash import xxh3_128_hexdigest

from common.checks import pair_up
from common.config_file import nearest
from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.convention import Convention
from sd3 import images
from sd3.contact_sheet import save_png
from sd3.image_files import BadImage, read_file
from sd3.pixels import to_image
from sd3.value_scale import AS_IS
from shards.reading.cache import Cache

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
KEYS = ("prompt", "image", "mask", "negative_prompt", "seed")
# Kept in memory; each is needed several times in a row.
DECODED_IMAGES = 8


@dataclass(frozen=True)
class Control:
    """A conditioning image, or the photograph that one is drawn from; read when it is needed.

    Attributes:
        path: the image's file.
        digest: XXH3-128 of the file's bytes.
        where: the option that it comes from, for errors.
        is_ready: whether its pixels are those of training; a file from elsewhere becomes so by the
            ControlNet's background and scale.
        mask: file of a mask, for inpainting; None where the image is transparent instead.
        mask_digest: of its bytes; empty without one.
    """

    path: Path
    digest: str
    where: str = "--image"
    is_ready: bool = False
    mask: Path | None = None
    mask_digest: str = ""

    def image(self, convention: Convention) -> Image.Image:
        """Return the image as a ControlNet's training data had it: RGB, of any size.

        Raises:
            ConfigError: it cannot be decoded, or not at the ControlNet's scale.
        """
        scale = AS_IS if self.is_ready else convention.scale
        return _decode_control(self, convention.background, scale)

    def photograph(self, convention: Convention) -> Image.Image:
        """Return the file as a photograph, from which a conditioning image can be drawn: RGB.

        Raises:
            ConfigError: it cannot be decoded.
        """
        return _decode_photograph(self, convention.background)

    def picture_and_mask(self, convention: Convention) -> tuple[Image.Image, Image.Image]:
        """Return, for inpainting, the image in RGB and its mask, white where it is drawn anew.

        Raises:
            ConfigError: one cannot be decoded, or there is no mask and nothing is transparent.
        """
        if self.mask is None:
            return _decode_transparent(self)
        return self.photograph(convention), _decode_mask(self)


def load_control(
    path: Path, where: str = "--image", *, is_ready: bool = False, mask: Path | None = None
) -> Control:
    """Return a file as a control; see `Control`.

    Raises:
        ConfigError: it cannot be read, or its mask cannot.
    """
    with _named(where, path):
        digest = xxh3_128_hexdigest(read_file(path))
    if mask is None:
        return Control(path, digest, where, is_ready)
    with _named("--mask", mask):
        mask_digest = xxh3_128_hexdigest(read_file(mask))
    return Control(path, digest, where, is_ready, mask, mask_digest)


@lru_cache(maxsize=DECODED_IMAGES)
def _decode_control(control: Control, background: str, scale: str) -> Image.Image:
    with _named(control.where, control.path):
        data = _read_again(control.path, control.digest)
        return images.decode_conditioning(data, background, scale)


@lru_cache(maxsize=DECODED_IMAGES)
def _decode_photograph(control: Control, background: str) -> Image.Image:
    with _named(control.where, control.path):
        return images.decode(_read_again(control.path, control.digest), background)


@lru_cache(maxsize=DECODED_IMAGES)
def _decode_transparent(control: Control) -> tuple[Image.Image, Image.Image]:
    with _named(control.where, control.path):
        try:
            return images.decode_for_inpainting(_read_again(control.path, control.digest))
        except BadImage as error:
            raise BadImage(f"{error}; give --mask") from error


@lru_cache(maxsize=DECODED_IMAGES)
def _decode_mask(control: Control) -> Image.Image:
    assert control.mask is not None
    with _named("--mask", control.mask):
        return images.decode_conditioning(_read_again(control.mask, control.mask_digest))


def _read_again(path: Path, digest: str) -> bytes:
    data = read_file(path)
    if xxh3_128_hexdigest(data) != digest:
        raise BadImage("it was changed while pictures were drawn from it; start again")
    return data


@contextmanager
def _named(where: str, path: Path) -> Iterator[None]:
    try:
        yield
    except BadImage as error:
        raise ConfigError(f"{where} {path}: {error}.") from error


@dataclass(frozen=True)
class DrawRequest:
    """A prompt with its conditioning images, and the seeds to draw it with.

    Attributes:
        prompt: what to draw.
        negative_prompt: what not to draw.
        controls: one conditioning image, or one for each combined ControlNet.
        seeds: one for each picture.
    """

    prompt: str
    negative_prompt: str
    controls: tuple[Control, ...]
    seeds: tuple[int, ...]


def find_requests(config: GenerateConfig, cache: Cache | None) -> list[DrawRequest]:
    """Return the requests that the settings give.

    Args:
        config: settings with prompts and images, or with a file or folder of them.
        cache: source of validation pairs; used where the settings give nothing else.

    Raises:
        ConfigError: a file cannot be read, or its contents do not go together.
    """
    if config.pairs is not None:
        entries = list(_from_folder(config) if config.pairs.is_dir() else _from_file(config.pairs))
        if not entries:
            raise ConfigError(f"--pairs {config.pairs}: nothing in it to draw.")
    elif config.prompt:
        entries = _from_options(config)
    else:
        assert cache is not None
        entries = _from_validation(config, cache)
    loaded: dict[tuple[Path, Path | None], Control] = {}
    return [_to_request(entry, config, loaded) for entry in entries]


@dataclass(frozen=True)
class _Entry:
    """A pair before its images are loaded; None stands for the run's own setting.

    `where` names the pair's origin in error messages.
    """

    where: str
    prompt: str
    images: tuple[Path, ...]
    negative_prompt: str | None = None
    seed: int | None = None
    is_ready: bool = False
    mask: Path | None = None


def _to_request(
    entry: _Entry, config: GenerateConfig, loaded: dict[tuple[Path, Path | None], Control]
) -> DrawRequest:
    """Return an entry with its images, each file read once.

    Raises:
        ConfigError: an image cannot be read.
    """
    controls = []
    for path in entry.images:
        key = path, entry.mask
        if key not in loaded:
            loaded[key] = load_control(path, entry.where, is_ready=entry.is_ready, mask=entry.mask)
        controls.append(loaded[key])
    negative = config.negative_prompt if entry.negative_prompt is None else entry.negative_prompt
    seeds = config.seed if entry.seed is None else (entry.seed,)
    return DrawRequest(entry.prompt, negative, tuple(controls), seeds)


def _from_options(config: GenerateConfig) -> list[_Entry]:
    """Return the pairs of --prompt and --image.

    Raises:
        ConfigError: the numbers of prompts and images do not go together.
    """
    count = len(config.controlnet) if config.combine else 1
    paths = config.image
    if count > 1 and len(paths) > 1:
        groups = [paths[at : at + count] for at in range(0, len(paths), count)]
        prompts = config.prompt * (len(groups) if len(config.prompt) == 1 else 1)
        groups *= len(prompts) if len(groups) == 1 else 1
        if len(prompts) != len(groups) or len(paths) % count:
            raise ConfigError(
                f"{len(config.prompt)} --prompt and {len(paths)} --image for {count} ControlNets: "
                f"give {count} images for each prompt, {count} in all, or one."
            )
        return [
            _Entry("--image", prompt, group) for prompt, group in zip(prompts, groups, strict=True)
        ]
    masks: tuple[Path | None, ...] = config.mask or (None,)
    masked = tuple(zip(paths, masks * (len(paths) if len(masks) == 1 else 1), strict=True))
    pairs = pair_up(config.prompt, masked, "--prompt", "--image")
    return [_Entry("--image", prompt, (path,), mask=mask) for prompt, (path, mask) in pairs]


def _from_folder(config: GenerateConfig) -> Iterator[_Entry]:
    """Yield the images of a folder by name, each with the prompt in the text file beside it.

    Raises:
        ConfigError: an image has no readable text file.
    """
    assert config.pairs is not None
    for path in sorted(config.pairs.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        text = path.with_suffix(".txt")
        try:
            prompt = text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--pairs {config.pairs}: {path.name} needs its prompt in {text.name} ({error})."
            ) from error
        yield _Entry("--pairs", prompt, (path,))


def _from_file(path: Path) -> Iterator[_Entry]:
    """Yield the pairs of TOML's [[pair]] tables or of JSON lines.

    Paths in the file are relative to its folder.

    Raises:
        ConfigError: the file cannot be read, or a pair is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            tables = [
                (f"{path}, pair {number}:", table)
                for number, table in enumerate(tomllib.loads(text).get("pair", []), 1)
            ]
        else:
            tables = [
                (f"{path}, line {number}:", json.loads(line))
                for number, line in enumerate(text.split("\n"), 1)
                if line.strip()
            ]
    except OSError as error:
        raise ConfigError(f"--pairs {path}: {error.strerror or error}.") from error
    except ValueError as error:  # of JSON, TOML and UTF-8
        raise ConfigError(f"--pairs {path}: neither TOML nor JSON lines ({error}).") from error
    for where, table in tables:
        yield _parse_entry(where, table, path.parent)


def _parse_entry(where: str, table: Any, folder: Path) -> _Entry:
    """Return the pair in a table of a file.

    Raises:
        ConfigError: it is no table, or a key or a type is wrong.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where} expected prompt and image, found {table!r}.")
    for name in table:
        if name not in KEYS:
            raise ConfigError(f"{where} unknown key {name!r}.{nearest(name, list(KEYS))}")
    paths = table.get("image")
    paths = [paths] if isinstance(paths, str) else paths
    kinds = (
        ("prompt", str, table.get("prompt")),
        ("mask", str, table.get("mask", "")),
        ("negative_prompt", str, table.get("negative_prompt", "")),
        ("seed", int, table.get("seed", 0)),
    )
    for name, kind, value in kinds:
        if type(value) is not kind:
            raise ConfigError(f"{where} {name}: expected {kind.__name__}, found {value!r}.")
    if not isinstance(paths, list) or not paths or not all(isinstance(name, str) for name in paths):
        raise ConfigError(f"{where} image: expected a path, or a list of them, found {paths!r}.")
    return _Entry(
        where,
        table["prompt"],
        tuple(folder / name for name in paths),
        table.get("negative_prompt"),
        table.get("seed"),
        mask=folder / table["mask"] if "mask" in table else None,
    )


def _from_validation(config: GenerateConfig, cache: Cache) -> list[_Entry]:
    """Return the cache's validation pairs; save their conditioning images as files.

    Raises:
        ConfigError: the cache has no validation pairs.
    """
    entries: list[_Entry] = []
    reader = cache.validation
    for location in reader.locations():
        pixels = reader.tensors(*location)["conditioning_image"]
        path = config.output_dir / f"conditioning-{len(entries):03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, to_image(pixels))
        prompt = str(reader.metadata(*location).get("prompt", ""))
        entries.append(_Entry("--cache", prompt, (path,), is_ready=True))
    if not entries:
        raise ConfigError(
            f"--cache {config.cache}: it has no validation pairs; give --prompt and --image."
        )
    return entries
