"""Local data sets, through the `datasets` library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from precompute.fill50k import PROMPTS
from precompute.sources import SourceSettings
from shards.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

# An image folder's table, and the `datasets` builder that reads it.
METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}
FILE_NAME = "file_name"
LONGEST_REASON = 300


def load_local(settings: SourceSettings, path: Path, where: str) -> tuple["Dataset", Path]:
    """Return a local data set, and the folder that its file names are relative to.

    Args:
        settings: which configuration, and where `datasets` may write.
        path: a folder, or one file of a data set.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: `datasets` cannot read it, or it has several splits and none is `train`.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    # Absolute, since `datasets` takes a folder called `csv` for its own module of that name.
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    cache_dir = None if settings.cache_dir is None else str(settings.cache_dir)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return pick_split(load_from_disk(str(path)), where), folder
        if (metadata := _metadata(path)) is not None:
            builder = METADATA[metadata.name]
            loaded = load_dataset(builder, data_files=str(metadata), cache_dir=cache_dir)
            return _with_image_columns(pick_split(loaded, where)), metadata.parent
        loaded = load_dataset(
            str(folder),
            settings.dataset_config_name,
            data_files=None if folder == path else path.name,
            cache_dir=cache_dir,
        )
    except ConfigError:
        raise
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        inner = sorted(folder.glob(f"*/{PROMPTS}"))
        hint = f" Did you mean {inner[0].parent}?" if inner else ""
        kind = f"not fill50k, no {PROMPTS} in this folder" if path.is_dir() else "not a zip"
        raise ConfigError(
            f"{where}: {kind}; and `datasets` finds no data in it "
            f"(images with metadata.jsonl, Parquet, WebDataset tars, …).{hint}"
        ) from error
    except Exception as error:  # its builders raise whatever the libraries beneath them raise
        raise ConfigError(f"{where}: `datasets` cannot read it: {reason(error)}") from error
    return pick_split(loaded, where), folder


def pick_split(loaded: Any, where: str) -> "Dataset":
    """Return the split called `train`, or the only one.

    Raises:
        ConfigError: several splits, and none is `train`.
    """
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded or len(loaded) == 1:
        return loaded.get("train") or next(iter(loaded.values()))
    raise ConfigError(f"{where}: no split 'train'; it has {', '.join(map(str, loaded))}.")


def reason(error: BaseException) -> str:
    """Return the root of an error of `datasets` in one line; its own say "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


def _metadata(path: Path) -> Path | None:
    """Return the one table of an image folder; None if there is none, or one for each folder.

    `datasets` would list every image of such a folder, and refuse names with `..`, captions of
    mixed types and images that are missing.
    """
    found = [
        folder / name
        for folder in (path, path / "train")
        for name in METADATA
        if (folder / name).is_file()
    ]
    return found[0] if len(found) == 1 else None


def _with_image_columns(dataset: "Dataset") -> "Dataset":
    """Return an image folder's table with the columns called as `datasets` would call them."""
    names = {
        name: name.removesuffix(FILE_NAME).removesuffix("_") or "image"
        for name in dataset.column_names
        if name == FILE_NAME or name.endswith(f"_{FILE_NAME}")
    }
    free = {old: new for old, new in names.items() if new not in dataset.column_names}
    return dataset.rename_columns(free)
