"""Opening the data set that the settings name."""

from pathlib import Path

from common.errors import ConfigError
from precompute.sources import tables
from precompute.sources.files.open_files import open_files
from precompute.sources.files.open_tables import refuse_options_of_pairs
from precompute.sources.local import is_saved, names_configurations
from precompute.sources.one_caption import OneCaption
from precompute.sources.parquet.parquet_table import open_parquet
from precompute.sources.source import Source, SourceSettings
from precompute.sources.webdataset.finding import find_tars
from precompute.sources.webdataset.tars import open_tars
from sd3.pretrained import is_hub_id


def open_source(settings: SourceSettings) -> Source:
    """Return the data set that the settings name.

    Raises:
        ConfigError: none or several are named, nothing is there, it cannot be read, or it lacks
            a column.
    """
    source = _open(settings, *_flag_and_name(settings))
    return source if settings.caption is None else OneCaption(source, settings.caption)


def _open(settings: SourceSettings, flag: str, name: str) -> Source:
    where, path = f"{flag} {name}", Path(name)
    if not path.exists():
        if flag == "--dataset-name" and is_hub_id(name):
            refuse_options_of_pairs(settings, where)
            return tables.open_hub(settings, name, where)
        hub = ", and not a hub id (owner/name)" if flag == "--dataset-name" else ""
        raise ConfigError(
            f"{where}: no such file or folder{hub}. Expected a folder or zip of pictures, a table "
            "that names them, or a folder that the datasets library can load."
        )
    source, remarks = open_files(settings, path, where)
    source = source or _open_others(settings, path, where)
    source.remarks += remarks
    return source


def _open_others(settings: SourceSettings, path: Path, where: str) -> Source:
    """Return a local data set that is none of plain files."""
    refuse_options_of_pairs(settings, where)
    tars, remarks = find_tars(settings, path, where)
    if tars:
        source = open_tars(settings, tars, where)
        source.remarks += remarks
        return source
    if settings.dataset_config_name is None and not (is_saved(path) or names_configurations(path)):
        table = open_parquet(settings, path, where)
        if table is not None:
            return table
    return tables.open_local(settings, path, where)


def _flag_and_name(settings: SourceSettings) -> tuple[str, str]:
    """Return the flag that names the data set, and the name that it gives."""
    named = [
        (f"--{field.replace('_', '-')}", value)
        for field in ("source", "dataset_name", "train_data_dir")
        if (value := getattr(settings, field)) is not None
    ]
    if len(named) != 1:
        flags = " and ".join(flag for flag, _ in named) or "none of them"
        raise ConfigError(
            "give one of --source, --dataset-name and --train-data-dir, which say where the rows "
            f"come from; found {flags}."
        )
    return named[0]
