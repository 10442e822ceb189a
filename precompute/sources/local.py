"""Local data sets, through the `datasets` library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from precompute.sources.fill50k import PROMPTS
from precompute.sources.source import SourceSettings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

# What an image folder's table is called, and how other tables' names end.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
NO_TABLES = ("dataset_infos.json", "dataset_info.json")
FILE_NAME = "file_name"
LONGEST_REASON = 300
IMAGE_FOLDER = "imagefolder"


def load_local(settings: SourceSettings, path: Path, where: str) -> tuple["Dataset", Path]:
    """Return a local data set, and the folder that its file names are relative to.

    Args:
        settings: which configuration, and where `datasets` may write.
        path: a folder, or one file of a data set.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: `datasets` cannot read it, or it has several splits and none is `train`.
    """
    from datasets import (
        concatenate_datasets,
        load_dataset,
        load_dataset_builder,
        load_from_disk,
    )
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    # Absolute, since `datasets` takes a folder called `csv` for its own module of that name.
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    cache_dir = None if settings.cache_dir is None else str(settings.cache_dir)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return pick_split(load_from_disk(str(path)), where), folder
        table = _only_table(path) if settings.dataset_config_name is None else None
        inner = sorted(path.glob(f"*/{PROMPTS}"))
        if table is None and inner:
            raise ConfigError(
                f"{where}: not fill50k, no {PROMPTS} in this folder. Did you mean "
                f"{inner[0].parent}?"
            )
        builder = load_dataset_builder(
            str(folder),
            settings.dataset_config_name,
            data_files=None if table is None else table.name,
            cache_dir=cache_dir,
        )
        if builder.name == IMAGE_FOLDER and len(lists := _lists_of_images(builder, where)) > 1:
            parts = [
                load_dataset(IMAGE_FOLDER, data_files=one, split="train", cache_dir=cache_dir)
                for one in lists
            ]
            return concatenate_datasets(parts), folder
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except ConfigError:
        raise
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        kind = f"not fill50k, no {PROMPTS} in this folder" if path.is_dir() else "not a zip"
        raise ConfigError(
            f"{where}: {kind}; and `datasets` finds no data in it "
            "(images with metadata.jsonl, Parquet, WebDataset tars, …)."
        ) from error
    except Exception as error:  # its builders raise whatever the libraries beneath them raise
        raise ConfigError(f"{where}: `datasets` cannot read it: {reason(error)}") from error
    return _with_image_columns(pick_split(loaded, where)), folder


def pick_split(loaded: Any, where: str) -> Any:
    """Return what belongs to the split called `train`, or to the only one.

    Args:
        loaded: a mapping from splits' names, or what has no splits, which is returned as it is.
        where: the data set as the user named it, for errors.

    Raises:
        ConfigError: several splits, and none is `train`.
    """
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded or len(loaded) == 1:
        return loaded["train" if "train" in loaded else next(iter(loaded))]
    raise ConfigError(f"{where}: no split 'train'; it has {', '.join(map(str, loaded))}.")


def reason(error: BaseException) -> str:
    """Return the root of an error of `datasets` in one line; its own say "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


def _only_table(path: Path) -> Path | None:
    """Return the one file that lists a data set's rows; None if there is none, or several.

    Left alone, `datasets` takes a table beside more images for one of the images' belongings;
    and of an image folder with metadata.jsonl it would list every file, and refuse names with
    `..` and captions of mixed types.
    """
    if path.is_file():
        return path
    folders = [path, *(one for one in path.iterdir() if one.is_dir())]
    metadata = [folder / name for folder in folders for name in METADATA]
    if found := [one for one in metadata if one.is_file()]:
        return found[0] if len(found) == 1 and found[0].parent == path else None
    tables = [one for one in path.iterdir() if one.suffix in TABLES and one.name not in NO_TABLES]
    return tables[0] if len(tables) == 1 else None


def _lists_of_images(builder: "DatasetBuilder", where: str) -> list[str]:
    """Return the files that list an image folder's rows, in the order of their paths.

    `datasets` itself would keep several tables in a set, and so put their rows in another order
    with every process.
    """
    files = pick_split(builder.config.data_files or {}, where)
    return sorted(one for one in files if Path(one).name in METADATA)


def _with_image_columns(dataset: "Dataset") -> "Dataset":
    """Return an image folder's table with the columns called as `datasets` would call them."""
    names = {
        name: name.removesuffix(FILE_NAME).removesuffix("_") or "image"
        for name in dataset.column_names
        if name == FILE_NAME or name.endswith(f"_{FILE_NAME}")
    }
    free = {old: new for old, new in names.items() if new not in dataset.column_names}
    return dataset.rename_columns(free)
