"""Data sets of plain files, recognised by what lies where."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from precompute.sources.counted import first_few, remark
from precompute.sources.files.folder import Folder
from precompute.sources.files.listed import Listed
from precompute.sources.files.open_tables import open_tables
from precompute.sources.files.pairs import has_controls, open_pairs
from precompute.sources.files.records import TABLES
from precompute.sources.files.survey import (
    Survey,
    caption_endings,
    of_split,
    refuse_pointers,
    take_survey,
)
from precompute.sources.files.text_tables import (
    PROMPTS,
    columns_of,
    count_records,
    has_images,
    names_pictures,
)
from precompute.sources.files.tree import Tree, ending
from precompute.sources.files.zips import Zips, is_zip
from precompute.sources.source import Source, SourceSettings
from precompute.sources.splits import left_out_remark

# What `save_to_disk` of the datasets library leaves.
SAVED = ("state.json", "dataset_dict.json")


def open_files(settings: SourceSettings, path: Path, where: str) -> tuple[Source | None, list[str]]:
    """Return a data set of plain files, None if there are others, such as tars or Parquet.

    Args:
        settings: what the rows need.
        path: of a folder, a zip or a table of text.
        where: the path as the user gave it, for errors.

    Returns:
        the data set, and remarks on what is no part of it, however it is read.

    Raises:
        ConfigError: it cannot be read, holds two data sets, or lacks captions or images.
    """
    try:
        if path.is_dir():
            tree = Folder(path)
            source = _open_folder(settings, tree, path, where)
            return source, remark("caches in this folder, not read", list(tree.caches))
        refuse_pointers(Folder(path.parent), [path.name], where)
        if ending(path.name) in TABLES:
            kept, _ = of_split([path.name], settings.split, where)
            return open_tables(settings, Folder(path.parent), kept, where, path.parent), []
        if is_zip(path):
            return _open_zips(settings, [path], where), []
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error}).") from error
    return None, []


def _open_folder(settings: SourceSettings, tree: Folder, path: Path, where: str) -> Source | None:
    if settings.dataset_config_name is not None or any((path / name).is_file() for name in SAVED):
        return None
    survey = take_survey(tree, caption_endings(settings))
    if "" in tree.caches:
        raise ConfigError(f"{where}: is a cache that precompute made; give the data set.")
    tables = survey.prompts + survey.metadata + survey.tables + survey.binary_tables
    refuse_pointers(tree, tables + survey.tars + survey.zips, where)
    if source := _open_tree(settings, tree, survey, where, path):
        return source
    if survey.zips and not survey.binary_tables and not survey.tars:
        return _open_zips(settings, [path / name for name in survey.zips], where)
    return None


def _open_zips(settings: SourceSettings, paths: Sequence[Path], where: str) -> Source:
    tree = Zips(paths, where)
    survey = take_survey(tree, caption_endings(settings))
    source = _open_tree(settings, tree, survey, where, None)
    if source is None:
        raise ConfigError(
            f"{where}: no {PROMPTS} in this zip, and no metadata.jsonl, no other table and no "
            "pictures that could be read from it."
        )
    source.layout += ", in a zip" if tree.is_single else f", in {len(paths)} zips"
    source.remarks += tree.replaced.remark("not read, since the zip has a later one of the name")
    return source


def _open_tree(
    settings: SourceSettings, tree: Tree, survey: Survey, where: str, folder: Path | None
) -> Source | None:
    """Return a data set of the files in a tree; None if they are none.

    Args:
        settings: what the rows need.
        tree: the files.
        survey: of the tree.
        where: the data set as the user gave it, for errors.
        folder: of the tree, in which zips may lie; None if it lies in a zip itself.

    Raises:
        ConfigError: there are two data sets, or captions or images are missing.
        OSError: something cannot be read.
    """
    elsewhere = survey.binary_tables + survey.tars
    topmost = min(survey.prompts, key=lambda name: name.count("/"), default="")
    if topmost and ("/" not in topmost or not survey.metadata + survey.tables):
        prompts = [one for one in survey.prompts if one.count("/") == topmost.count("/")]
        kept, left_out = of_split(prompts, settings.split, where)
        source = open_tables(settings, tree, kept, where, folder)
        _remark_pictures(source, tree, survey, left_out)
        others = [one for one in survey.prompts if one not in prompts]
        others += survey.metadata + survey.tables + elsewhere
        source.remarks += remark("tables and tars that are not read", others)
        return source
    _set_aside(settings, tree, survey, where)
    elsewhere = survey.binary_tables + survey.tars
    if _counts(survey.metadata, elsewhere, tree, settings):
        return _open_metadata(settings, tree, survey, where, folder)
    tables = [name for name in survey.tables if has_images(tree, name, settings)]
    others = [name for name in survey.tables if name not in tables]
    if tables:
        if len({ending(name) for name in tables}) > 1 or elsewhere:
            raise _two_tables(where, [*tables, *elsewhere])
        kept, left_out = of_split(tables, settings.split, where)
        source = open_tables(settings, tree, kept, where, folder)
        _remark_pictures(source, tree, survey, left_out)
        source.remarks += remark("tables without images, not read", others)
        return source
    can_pair = settings.caption is not None or survey.captioned.count
    if elsewhere:
        if survey.captioned.count:
            raise ConfigError(
                f"{where}: two data sets, {survey.captioned.count} pictures with caption files "
                f"and {first_few(elsewhere)}: give the latter as the path, or move them away."
            )
        return None
    readable = [] if can_pair else [name for name in others if columns_of(tree, name)]
    if readable or (others and not survey.picture_folders):  # this says what is missing in it
        return open_tables(settings, tree, (readable or others)[:1], where, folder)
    if not survey.picture_folders:
        return None
    pairs = open_pairs(settings, tree, survey, where)
    pairs.remarks += remark(
        "tables that lack columns, or name no pictures here, not read", survey.aside
    )
    pairs.remarks += remark("zips that are not read", survey.zips)
    return pairs


def _set_aside(settings: SourceSettings, tree: Tree, survey: Survey, where: str) -> None:
    """Set aside what only lies beside pictures that make a data set with files of their names.

    These are Parquet files without a column of images, as of img2dataset; and tables, unless one
    of them has all columns and names pictures, and no option says how captions end.
    """
    if not survey.picture_folders or not (survey.captioned.count or settings.caption is not None):
        return
    columns = {name: columns_of(tree, name) for name in survey.binary_tables}
    survey.aside = [
        name for name, found in columns.items() if found and not has_images(tree, name, settings)
    ]
    survey.binary_tables = [name for name in survey.binary_tables if name not in survey.aside]
    tables = survey.metadata + survey.tables
    if settings.caption_extension is not None or (
        has_controls(settings, tree, survey, where)
        and not any(names_pictures(tree, name, settings) for name in tables)
    ):
        survey.aside += tables
        survey.metadata, survey.tables = [], []


def _counts(
    metadata: list[str], elsewhere: list[str], tree: Tree, settings: SourceSettings
) -> bool:
    """Tell whether image folders' tables are the data set: also beside others, if they may be."""
    return bool(metadata) and (
        not elsewhere or any(has_images(tree, name, settings) for name in metadata)
    )


def _open_metadata(
    settings: SourceSettings, tree: Tree, survey: Survey, where: str, folder: Path | None
) -> Source:
    """Return the rows of image folders' tables."""
    kept, left_out = of_split(survey.metadata, settings.split, where)
    in_one_folder = {name.rpartition("/")[0] for name in kept}
    if len(in_one_folder) < len(kept):
        raise _two_tables(where, kept)
    if elsewhere := survey.binary_tables + survey.tars:
        raise _two_tables(where, [*kept, *elsewhere])
    source = open_tables(settings, tree, kept, where, folder)
    _remark_pictures(source, tree, survey, left_out)
    source.remarks += remark("tables that are not read", survey.tables)
    return source


def _two_tables(where: str, names: list[str]) -> ConfigError:
    return ConfigError(f"{where}: two tables or more, {first_few(names)}: give one as the path.")


def _remark_pictures(
    source: Listed, tree: Tree, survey: Survey, left_out: dict[str, list[str]]
) -> None:
    """Add remarks on the rows of splits that are not read, and on pictures in no row."""
    for split, tables in left_out.items():
        num_rows = sum(count_records(tree, table) for table in tables)
        source.remarks.append(left_out_remark(num_rows, split))
    source.remarks += remark("tables in folders below that are not read", survey.inner_tables)
    unnamed = survey.num_pictures - source.stored.num_names
    if unnamed > 0 and not left_out:
        source.remarks.append(
            f"pictures that no row names, or no option asks for: {unnamed} of {survey.num_pictures}"
        )
    source.remarks += survey.captioned.remark(
        "caption files beside pictures, not read, since a table has the captions"
    )
