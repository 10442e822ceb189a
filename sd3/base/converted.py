"""One-file checkpoints as diffusers folders, converted once by diffusers and kept.

Everything else then reads a folder: fingerprints, new ControlNets, streamed and quantised weights.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from safetensors import safe_open
from xxhash import xxh3_64_hexdigest

from common.atomic_files import (
    cannot_write,
    give_usual_permissions,
    move_into_place,
    require_space,
    write_text,
)
from common.errors import ConfigError
from common.locks import lock
from sd3.base.contents import Contents, component_of
from sd3.pretrained import has_component

SOURCE = "source.json"
MODELS = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}
COMPONENTS = (
    *MODELS,
    *(f"{kind}{number}" for number in ("", "_2", "_3") for kind in ("text_encoder", "tokenizer")),
)


def converted_base(
    file: Path,
    contents: Contents,
    folder: Path,
    wanted: Sequence[str],
    *,
    flag: str,
    kept_in: Path,
) -> Path:
    """Return a diffusers folder in which a checkpoint's components stand in place of a folder's.

    What was converted before is found again, unless the checkpoint or diffusers has changed since.
    The folder's other components are links.

    Args:
        file: the checkpoint.
        contents: what to take of it.
        folder: a diffusers folder with the configurations of all its components.
        wanted: components that are needed now; others are converted when they are.
        flag: the option that gave the file, for messages.
        kept_in: folder for what is converted.

    Raises:
        ConfigError: the checkpoint does not fit the folder's configurations.
        OSError: the disk is full.
    """
    names = f"{file.resolve()}\0{folder.resolve()}\0{' '.join(contents.components)}"
    target = kept_in / f"{file.stem}-{xxh3_64_hexdigest(names.encode())[:8]}"
    kept_in.mkdir(parents=True, exist_ok=True)
    with _alone(kept_in / f"{target.name}.lock"):
        _renew(target, file)
        for entry in folder.iterdir():
            # The folder may be one of these itself.
            if entry.name not in contents.components and entry.name != SOURCE:
                _link(target / entry.name, entry)
        for name in contents.components:
            (target / name).mkdir(exist_ok=True)
            if has_component(folder, name):
                _link(target / name / "config.json", folder / name / "config.json")
            if name in wanted and not any((target / name).glob("*.safetensors")):
                _convert(file, name, contents.dtypes[name], folder, target, flag)
    return target


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time convert; the others wait, and find what it made."""
    with path.open("wb") as held:
        lock(held, fcntl.LOCK_EX)
        yield


def _renew(target: Path, file: Path) -> None:
    """Empty the folder of what was converted if the checkpoint or diffusers has changed."""
    from diffusers import __version__

    status = file.stat()
    source = {
        "file": str(file.resolve()),
        "num_bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "diffusers": __version__,
    }
    known = None
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((target / SOURCE).read_text(encoding="utf-8"))
    if known != source:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        write_text(target / SOURCE, json.dumps(source, indent=1) + "\n")


def _link(link: Path, entry: Path) -> None:
    aim = entry.resolve()
    if not (link.is_symlink() and Path(os.readlink(link)) == aim):  # noqa: PTH115
        link.unlink(missing_ok=True)
        link.symlink_to(aim)


def _convert(file: Path, name: str, dtype: str, folder: Path, target: Path, flag: str) -> None:
    size = _stored_bytes(file, name, dtype)
    click.echo(
        f"{flag} {file}: converting its {name}, {size / 1e9:.1f} GB, once, into {target}", err=True
    )
    require_space(target, size)
    with _quiet():
        model = _load(file, name, dtype, folder, flag)
    if any(weight.is_meta for weight in model.parameters()):
        raise _incomplete(file, name, flag)
    unfinished = target / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.save_pretrained(unfinished)
    except OSError as error:
        raise cannot_write(target, error, size) from error
    for path in unfinished.iterdir():
        give_usual_permissions(path)
    # Its configuration stays that of the folder, so that it is the one that was looked at before.
    _link(unfinished / "config.json", folder / name / "config.json")
    shutil.rmtree(target / name)
    move_into_place(unfinished, target / name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers' remarks on the way in which it converts, and its progress bars."""
    from diffusers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def _stored_bytes(file: Path, name: str, dtype: str) -> int:
    with safe_open(file, framework="pt") as opened:
        numbers: int = sum(
            math.prod(opened.get_slice(key).get_shape())
            for key in opened.keys()  # noqa: SIM118
            if component_of(key) == name
        )
    return numbers * (4 if dtype == "float32" else 2)


def _load(file: Path, name: str, dtype: str, folder: Path, flag: str) -> Any:
    """Return a component of a checkpoint, as diffusers reads it.

    Raises:
        ConfigError: it does not fit its configuration.
    """
    import diffusers
    import torch

    settings = {"config": str(folder), "torch_dtype": getattr(torch, dtype)}
    try:
        if name in MODELS:
            model = getattr(diffusers, MODELS[name])
            return model.from_single_file(
                str(file), subfolder=name, local_files_only=True, **settings
            )
        # Text encoders come with the pipeline alone, which training cannot import: it hides
        # transformers from diffusers.
        from diffusers import StableDiffusion3Pipeline

        others = dict.fromkeys(set(COMPONENTS) - {name})
        pipeline = StableDiffusion3Pipeline.from_single_file(str(file), **settings, **others)
        return getattr(pipeline, name)
    except NotImplementedError as error:  # torch's: weights without numbers cannot be moved
        raise _incomplete(file, name, flag) from error
    except (KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{flag} {file}: its {name} does not fit {folder / name / 'config.json'} "
            f"({type(error).__name__}: {reason}). Are they of the same model? "
            "--single-file-config names the folder of its configurations."
        ) from error


def _incomplete(file: Path, name: str, flag: str) -> ConfigError:
    return ConfigError(
        f"{flag} {file}: its {name} lacks weights that its configuration asks for. Is the file "
        "whole, and of the model that the configurations are of?"
    )
