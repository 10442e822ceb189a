"""Data sets on the hub, through the `datasets` library."""

import contextlib
from typing import TYPE_CHECKING

from common.errors import ConfigError
from precompute.sources.local import pick_split, root_cause
from precompute.sources.source import SourceSettings

if TYPE_CHECKING:
    from datasets import Dataset

# The branch with the hub's own conversion of a data set.
PARQUET_REVISION = "refs/convert/parquet"


def load_hub(settings: SourceSettings, name: str, where: str) -> tuple["Dataset", list[str]]:
    """Return a data set of the hub, or the hub's Parquet conversion of it if it is a script.

    With remarks on what of it is left out.

    Args:
        settings: which configuration and revision, and where `datasets` may write.
        name: the hub id.
        where: the hub id as the user gave it, for errors.

    Raises:
        ConfigError: unknown, gated, out of reach, or `datasets` cannot read it.
    """
    from datasets import load_dataset

    config, revision, data_dir = settings.dataset_config_name, settings.dataset_revision, None
    if revision is None and _is_script(name):  # the conversion has a folder for each configuration
        config, revision, data_dir = None, PARQUET_REVISION, config
    cache_dir = None if settings.cache_dir is None else str(settings.cache_dir)
    try:
        loaded = load_dataset(
            name, config, data_dir=data_dir, revision=revision, cache_dir=cache_dir
        )
    except Exception as error:  # its builders raise whatever the libraries beneath them raise
        raise ConfigError(_explain(error, settings, where)) from error
    return pick_split(loaded, settings.split, where)


def _explain(error: Exception, settings: SourceSettings, where: str) -> str:
    """Return why a data set of the hub cannot be loaded, and what to do."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    text = str(error)
    if isinstance(error, (DatasetNotFoundError, GatedRepoError)):
        if isinstance(error, GatedRepoError) or "gated" in text:
            return f"{where} is gated: accept its terms on its hub page, then `hf auth login`."
        if text.startswith("Revision"):
            if settings.dataset_revision:
                return f"{where} has no revision {settings.dataset_revision!r}."
            return (
                f"{where} is a script, which is not run, and the hub has no Parquet conversion of "
                "it. Download its data and give --train-data-dir."
            )
        return (
            f"{where}: no such folder here and no such data set on the hub "
            "(or it is private: `hf auth login`)."
        )
    if isinstance(error, (EmptyDatasetError, DataFilesNotFoundError)):
        return f"{where}: `datasets` finds no data in it."
    if isinstance(error, (ConnectionError, FileNotFoundError)):
        return (
            f"{where}: no such folder here, and the hub could not be reached "
            f"({type(error).__name__}). Check the name and the network."
        )
    hint = " Leave out --dataset-revision." if "scripts are no longer" in text else ""
    return f"{where}: `datasets` cannot read it: {root_cause(error)}{hint}"


def _is_script(name: str) -> bool:
    """Tell whether a data set is a script, which `datasets` refuses to run."""
    from huggingface_hub import HfApi

    # Loading the data set explains better what is wrong with the repository or the network.
    with contextlib.suppress(Exception):
        return bool(HfApi().file_exists(name, f"{name.rpartition('/')[2]}.py", repo_type="dataset"))
    return False
