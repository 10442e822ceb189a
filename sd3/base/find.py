"""Finding base models: a folder, the needed files of a hub repository, or a one-file checkpoint."""

import contextlib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common.errors import ConfigError
from sd3.base.contents import Contents, read_contents
from sd3.base.converted import converted_base
from sd3.base.without_t5 import T5_COMPONENTS
from sd3.pretrained import FILE_PATTERNS, download, has_component, is_hub_id
from sd3.single_file import is_one_file, refuse_file, refuse_files_alone

FLAG = "--pretrained-model-name-or-path"
CONFIG_FLAG = "--single-file-config"
TRANSFORMER_FLAG = "--transformer"
KEPT_IN = "sd3-one-file-bases"  # folder below that of downloads


def find_base(
    name_or_path: str,
    subfolders: Sequence[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
    weights: bool = True,
    single_file_config: str | None = None,
    transformer: Path | None = None,
) -> Path:
    """Return the local folder of a base model that holds at least `subfolders`.

    Args:
        name_or_path: a diffusers model folder, a hub id such as
            `stabilityai/stable-diffusion-3.5-medium`, or a one-file checkpoint.
        subfolders: components that the caller needs, e.g. `("vae",)`; only these are downloaded
            from the hub or converted from a checkpoint.
        revision: branch, tag or commit on the hub.
        variant: of the weight files, e.g. `fp16`, for components that have it.
        cache_dir: folder for downloads and for what is converted; None for the hub's default.
        weights: whether the weights are needed, or only configurations.
        single_file_config: folder or hub id of what a one-file checkpoint lacks: configurations,
            tokenizers, other components; None for the published model of its kind.
        transformer: a checkpoint whose transformer takes the place of the base's.

    Raises:
        ConfigError: neither a folder, a checkpoint nor a hub id, no access, or components missing.
    """
    find = partial(_find_folder, revision=revision, variant=variant, cache_dir=cache_dir)
    own = [name for name in subfolders if transformer is None or name != "transformer"]
    if is_one_file(name_or_path):
        file = Path(name_or_path)
        contents = read_contents(file, FLAG)
        folder = _lent_to(file, contents, find, subfolders, single_file_config, weights=weights)
        if weights:
            kept_in = _kept_in(cache_dir)
            folder = converted_base(file, contents, folder, own, flag=FLAG, kept_in=kept_in)
    elif single_file_config is not None:
        refuse_file("base model", name_or_path)
        raise ConfigError(
            f"{CONFIG_FLAG} {single_file_config}: {FLAG} {name_or_path} is no one-file checkpoint, "
            "and has its own configurations. Leave the option out."
        )
    else:
        folder = find(name_or_path, subfolders, weights=weights and own == [*subfolders])
        if weights and own and own != [*subfolders]:
            folder = find(name_or_path, own, weights=True)
    if transformer is None:
        return folder
    return _with_transformer(folder, transformer, subfolders, cache_dir, weights=weights)


def _lent_to(
    file: Path,
    contents: Contents,
    find: Callable[..., Path],
    subfolders: Sequence[str],
    single_file_config: str | None,
    *,
    weights: bool,
) -> Path:
    """Return the folder that has what a checkpoint lacks: all configurations, other weights."""
    lent = single_file_config or contents.published
    rest = [name for name in subfolders if name not in contents.components]
    try:
        folder = find(lent, subfolders, weights=False, flag=CONFIG_FLAG)
        return find(lent, rest, weights=True, flag=CONFIG_FLAG) if weights and rest else folder
    except ConfigError as error:
        if single_file_config is not None:
            raise ConfigError(f"{CONFIG_FLAG}: {error}") from error
        raise ConfigError(
            f"{FLAG} {file}: its configurations are fetched from {lent}: {error} "
            f"{CONFIG_FLAG} names a folder that has them."
        ) from error


def _with_transformer(
    folder: Path, file: Path, subfolders: Sequence[str], cache_dir: Path | None, *, weights: bool
) -> Path:
    """Return a base model's folder with the transformer of a checkpoint in place of its own."""
    if not is_one_file(str(file)):
        refuse_file(TRANSFORMER_FLAG, str(file))
        raise ConfigError(
            f"{TRANSFORMER_FLAG} {file}: {'a folder' if file.is_dir() else 'no such file'}. Give a "
            ".safetensors file with an SD3 transformer in it; the folder of a whole model goes to "
            f"{FLAG}."
        )
    contents = replace(read_contents(file, TRANSFORMER_FLAG), components=("transformer",))
    if not weights:
        return folder
    return converted_base(
        file, contents, folder, subfolders, flag=TRANSFORMER_FLAG, kept_in=_kept_in(cache_dir)
    )


def _kept_in(cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HOME) / KEPT_IN


def _find_folder(
    name_or_path: str,
    subfolders: Sequence[str],
    *,
    revision: str | None,
    variant: str | None,
    cache_dir: Path | None,
    weights: bool,
    flag: str = FLAG,
) -> Path:
    """Return the local folder of a diffusers model; see `find_base`."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        refuse_file("base model", name_or_path)
        if not is_hub_id(name_or_path):
            raise ConfigError(
                f"base model {name_or_path!r}: no such folder, and not a hub id (owner/name). "
                f"Give {flag} a diffusers model folder or a hub id."
            )
        patterns = [f"{name}/{kind}" for name in subfolders for kind in FILE_PATTERNS]
        if weights:
            patterns += _weight_patterns(name_or_path, subfolders, revision, variant)
        ignored = [] if variant else ["*.fp16*", "*.bf16*"]
        folder = download(
            name_or_path, ["model_index.json", *patterns], ignored, revision, cache_dir
        )
    missing = [name for name in subfolders if not has_component(folder, name)]
    if missing:
        refuse_files_alone("base model", name_or_path, revision)
        of_t5_alone = set(missing) <= set(T5_COMPONENTS)
        hint = " SD3 draws without T5 too: --no-t5." if of_t5_alone else ""
        # Where no file matches, there is no folder either.
        present = sorted(path.name for path in folder.glob("*/"))
        raise ConfigError(
            f"base model {name_or_path!r}: no {', '.join(f'{name}/' for name in missing)} in it; "
            f"found {', '.join(f'{name}/' for name in present) or 'no folders'}. "
            f"A diffusers model folder has one folder for each component.{hint}"
        )
    return folder


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
