"""Telling weight files from model folders, and refusing those that cannot be read."""

import contextlib
from pathlib import Path

from common.errors import ConfigError

READ = ".safetensors"
# What to do with files of other kinds.
UNREAD = {
    ".gguf": "GGUF's numbers are not read here. Give the model in 16 bit as .safetensors; "
    "--quantize-base int8, fp8 or nf4 makes it small in memory.",
    **dict.fromkeys(
        (".ckpt", ".pt", ".pth", ".bin"),
        "a pickled file, which can run code when it is opened. Give the model as .safetensors.",
    ),
}
SUFFIXES = (READ, *UNREAD)


def is_one_file(name_or_path: str) -> bool:
    """Return whether a path is that of a checkpoint that can be read."""
    return name_or_path.endswith(READ) and Path(name_or_path).is_file()


def refuse_file(what: str, name_or_path: str) -> None:
    """Refuse the path or address of a weight file where a folder or a hub id is needed.

    Args:
        what: is loaded, for the message, e.g. `base model`.
        name_or_path: as the user gave it.

    Raises:
        ConfigError: it is one; says what to do.
    """
    suffix = Path(name_or_path).suffix.lower()
    if suffix not in SUFFIXES or Path(name_or_path).is_dir():
        return
    begin = f"{what} {name_or_path!r}: "
    if "://" in name_or_path:
        raise ConfigError(f"{begin}a web address. Download the file and give its path.")
    if not Path(name_or_path).exists():
        raise ConfigError(f"{begin}no such file.")
    if suffix == READ and not name_or_path.endswith(READ):
        raise ConfigError(f"{begin}its name must end with {READ}, in small letters.")
    raise ConfigError(
        begin
        + UNREAD.get(
            suffix,
            "a file, and the folder that holds it with its config.json is needed: diffusers' "
            "format, as train writes it.",
        )
    )


def refuse_files_alone(what: str, name_or_path: str, revision: str | None) -> None:
    """Refuse a folder or a hub repository of raw weights: files and no components' folders.

    Call it where a component is missing.

    Args:
        what: is loaded, for the message.
        name_or_path: a folder, or a repository on the hub.
        revision: of the repository.

    Raises:
        ConfigError: it is one; says what to do.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        names = [path.relative_to(folder).as_posix() for path in folder.glob("*")]
    else:
        names = _names_on_the_hub(name_or_path, revision)
    weights = sorted(name for name in names if "/" not in name and name.endswith(SUFFIXES))
    if weights and "model_index.json" not in names and "config.json" not in names:
        listing = ", ".join(weights[:3]) + (f" and {len(weights) - 3} more" if weights[3:] else "")
        where = folder / weights[0] if folder.is_dir() else f"{weights[0]}, downloaded"
        raise ConfigError(
            f"{what} {name_or_path!r}: raw weights ({listing}), without the configurations and "
            f"tokenizers of a diffusers folder. Give a one-file checkpoint itself ({where}), or "
            "the hub id of the diffusers folder; that of SD3 medium ends with -diffusers."
        )


def _names_on_the_hub(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    # The caller reports what is missing, if not why; the HTTP library's errors change.
    with contextlib.suppress(Exception):
        return list(HfApi().list_repo_files(repo, revision=revision))
    return []
