"""Local data sets, through the `datasets` library."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from precompute.sources.columns import image_columns
from precompute.sources.source import SourceSettings
from precompute.sources.splits import choose_split, left_out_remark

if TYPE_CHECKING:
    from datasets import Dataset

# What `save_to_disk` of the datasets library leaves.
SAVED = ("state.json", "dataset_dict.json")
LONGEST_REASON = 300


def load_local(settings: SourceSettings, path: Path, where: str) -> tuple["Dataset", list[str]]:
    """Return a local data set, and remarks on what of it is left out.

    Args:
        settings: which configuration, and where `datasets` may write.
        path: a folder, or one file of a data set.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: `datasets` cannot read it, or there is no such split.
    """
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    # Absolute, since `datasets` takes a folder called `csv` for its own module of that name.
    path = path.absolute()
    try:
        return _load(settings, path, where)
    except ConfigError:
        raise
    except (EmptyDatasetError, DataFilesNotFoundError) as error:
        raise ConfigError(
            f"{where}: no data set, neither pictures nor a table of them (metadata.jsonl, "
            "prompt.json, CSV, …), nor a zip, Parquet or WebDataset tars."
        ) from error
    except Exception as error:  # its builders raise whatever the libraries beneath them raise
        raise ConfigError(f"{where}: `datasets` cannot read it: {root_cause(error)}") from error


def _load(settings: SourceSettings, path: Path, where: str) -> tuple["Dataset", list[str]]:
    from datasets import load_dataset_builder, load_from_disk

    if is_saved(path):
        return pick_split(load_from_disk(str(path)), settings.split, where)
    cache_dir = None if settings.cache_dir is None else str(settings.cache_dir)
    builder = load_dataset_builder(
        str(path if path.is_dir() else path.parent),
        settings.dataset_config_name,
        data_files=None if path.is_dir() else path.name,
        cache_dir=cache_dir,
    )
    builder.download_and_prepare()
    dataset, remarks = pick_split(builder.as_dataset(), settings.split, where)
    names = image_columns(dataset.column_names)
    renamed = dataset.rename_columns({old: new for new, old in names.items() if new != old})
    return renamed, remarks


def is_saved(path: Path) -> bool:
    """Tell whether a folder is one that the datasets library's `save_to_disk` wrote."""
    return any((path / name).is_file() for name in SAVED)


def names_configurations(path: Path) -> bool:
    """Tell whether a folder is a clone from the hub whose card says which files are read how."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    header = text.partition("\n---")[0]
    return header.startswith("---") and "\nconfigs:" in header


def pick_split(loaded: Any, wanted: str | None, where: str) -> tuple[Any, list[str]]:
    """Return a split, and remarks on those that are left out.

    Args:
        loaded: a mapping by splits' names; anything else is returned as it is.
        wanted: the split that the user asked for; by default `train`, or the only one.
        where: the data set as the user named it, for errors.

    Raises:
        ConfigError: there is no such split.
    """
    if not isinstance(loaded, dict):
        if wanted is not None:
            raise ConfigError(f"{where}: no split {wanted!r}; it has no splits.")
        return loaded, []
    chosen = choose_split(map(str, loaded), wanted, where)
    others = {str(split): len(rows) for split, rows in loaded.items() if str(split) != chosen}
    return loaded[chosen], [left_out_remark(count, split) for split, count in others.items()]


def root_cause(error: BaseException) -> str:
    """Return the message of the first error in a chain, in one line.

    The last one, of `datasets`, often says no more than "an error occurred".
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"
