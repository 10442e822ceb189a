"""Local data sets, through the `datasets` library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from precompute.sources.source import SourceSettings

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

# An image folder's table; those of text are read without `datasets`.
METADATA = "metadata.parquet"
PARQUET = ".parquet"
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
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    # Absolute, since `datasets` takes a folder called `csv` for its own module of that name.
    path = path.absolute()
    try:
        return _load(settings, path, where), path if path.is_dir() else path.parent
    except ConfigError:
        raise
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise ConfigError(
            f"{where}: no data set, neither pictures nor a table of them (metadata.jsonl, "
            "prompt.json, CSV, …), nor a zip, Parquet or WebDataset tars."
        ) from error
    except Exception as error:  # its builders raise whatever the libraries beneath them raise
        raise ConfigError(f"{where}: `datasets` cannot read it: {root_cause(error)}") from error


def _load(settings: SourceSettings, path: Path, where: str) -> "Dataset":
    from datasets import load_dataset_builder, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return pick_split(load_from_disk(str(path)), where)
    table = _only_table(path) if settings.dataset_config_name is None else None
    cache_dir = None if settings.cache_dir is None else str(settings.cache_dir)
    builder = load_dataset_builder(
        str(path if path.is_dir() else path.parent),
        settings.dataset_config_name,
        data_files=None if table is None else table.name,
        cache_dir=cache_dir,
    )
    if builder.name == IMAGE_FOLDER and len(files := _metadata_files(builder, where)) > 1:
        return _load_image_folders(files, cache_dir)
    builder.download_and_prepare()
    return _with_image_columns(pick_split(builder.as_dataset(), where))


def _load_image_folders(metadata_files: list[str], cache_dir: str | None) -> "Dataset":
    from datasets import concatenate_datasets, load_dataset

    return concatenate_datasets(
        [
            load_dataset(IMAGE_FOLDER, data_files=file, split="train", cache_dir=cache_dir)
            for file in metadata_files
        ]
    )


def pick_split(loaded: Any, where: str) -> Any:
    """Return the split called `train`, or the only split.

    Args:
        loaded: a mapping by splits' names; anything else is returned as it is.
        where: the data set as the user named it, for errors.

    Raises:
        ConfigError: several splits, and none is `train`.
    """
    if not isinstance(loaded, dict):
        return loaded
    if "train" in loaded or len(loaded) == 1:
        return loaded["train" if "train" in loaded else next(iter(loaded))]
    raise ConfigError(f"{where}: no split 'train'; it has {', '.join(map(str, loaded))}.")


def root_cause(error: BaseException) -> str:
    """Return the message of the first error in a chain, in one line.

    The last one, of `datasets`, often says no more than "an error occurred".
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


def _only_table(path: Path) -> Path | None:
    """Return the one file that lists a data set's rows; None if there is none, or several.

    Given the folder, `datasets` would read the images and ignore a table beside them.
    """
    if path.is_file():
        return path
    tables = [file for file in path.iterdir() if file.suffix == PARQUET]
    return tables[0] if len(tables) == 1 else None


def _metadata_files(builder: "DatasetBuilder", where: str) -> list[str]:
    """Return the files that list an image folder's rows, sorted by path.

    `datasets` itself would keep several files in a set, so that the order of the rows would change
    from process to process.
    """
    files = pick_split(builder.config.data_files or {}, where)
    return sorted(file for file in files if Path(file).name == METADATA)


def _with_image_columns(dataset: "Dataset") -> "Dataset":
    """Return an image folder's table with its columns named as `datasets` names them."""
    names = {
        name: name.removesuffix(FILE_NAME).removesuffix("_") or "image"
        for name in dataset.column_names
        if name == FILE_NAME or name.endswith(f"_{FILE_NAME}")
    }
    free = {old: new for old, new in names.items() if new not in dataset.column_names}
    return dataset.rename_columns(free)
