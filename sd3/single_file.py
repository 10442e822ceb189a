"""Telling single-file checkpoints from diffusers' model folders, which the stages need."""

import contextlib
from pathlib import Path

from common.errors import ConfigError

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def refuse_file(what: str, name_or_path: str, pipeline: str | None) -> None:
    """Refuse the path or address of a weight file.

    Args:
        what: is loaded, for the message, e.g. `base model`.
        name_or_path: as the user gave it.
        pipeline: the diffusers class that reads such files, if there is one.

    Raises:
        ConfigError: it is one; says what to do.
    """
    if name_or_path.lower().endswith(SUFFIXES) and not Path(name_or_path).is_dir():
        raise _refusal(what, name_or_path, Path(name_or_path).name, pipeline)


def refuse_files_alone(what: str, name_or_path: str, revision: str | None, pipeline: str) -> None:
    """Refuse a folder or a hub repository that has weight files and no components' folders.

    Call it where a component is missing.

    Args:
        what: is loaded, for the message.
        name_or_path: a folder, or a repository on the hub.
        revision: of the repository.
        pipeline: the diffusers class that reads such files, if there is one.

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
        raise _refusal(what, name_or_path, weights[0], pipeline)


def _names_on_the_hub(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    # The caller reports what is missing, if not why; the HTTP library's errors change.
    with contextlib.suppress(Exception):
        return list(HfApi().list_repo_files(repo, revision=revision))
    return []


def _refusal(what: str, name_or_path: str, file: str, pipeline: str | None) -> ConfigError:
    convert = ""
    if pipeline:
        convert = (
            f'; or convert it: {pipeline}.from_single_file("{file}").save_pretrained("FOLDER")'
        )
    where = "" if name_or_path.endswith(file) else f" ({file})"
    return ConfigError(
        f"{what} {name_or_path!r}: a single-file checkpoint{where}, and a diffusers model folder "
        f"is needed. Give one, or its hub id{convert}."
    )
