"""Data sets of plain files, recognised by what lies where."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from precompute.sources.files.counted_names import CountedNames
from precompute.sources.files.folder import Folder
from precompute.sources.files.listed import Listed
from precompute.sources.files.pairs import open_pairs
from precompute.sources.files.records import TABLES
from precompute.sources.files.stored_rows import StoredRows
from precompute.sources.files.survey import Survey, caption_endings, of_split, take_survey
from precompute.sources.files.text_tables import (
    PROMPTS,
    column_names,
    count_records,
    has_images,
    prompt_json_names,
    read_tables,
)
from precompute.sources.files.tree import Finder, Tree, ending
from precompute.sources.files.zips import Zips
from precompute.sources.source import Source, SourceSettings
from precompute.sources.splits import first_few, left_out_remark

# What `save_to_disk` of the datasets library leaves.
SAVED = ("state.json", "dataset_dict.json")
# So many rows tell whether a table's files lie in the zips beside it.
NUM_TRIED = 100


def open_files(settings: SourceSettings, path: Path, where: str) -> Source | None:
    """Return a data set of plain files; None if there are others, such as tars or Parquet.

    Args:
        settings: what the rows need.
        path: of a folder, a zip or a table of text.
        where: the path as the user gave it, for errors.

    Raises:
        ConfigError: it cannot be read, holds two data sets, or lacks captions or images.
    """
    try:
        if path.is_dir():
            return _open_folder(settings, path, where)
        if ending(path.name) in TABLES:
            kept, _ = of_split([path.name], settings.split, where)
            return _open_tables(settings, Folder(path.parent), kept, where, path.parent)
        if ending(path.name) == "zip" or zipfile.is_zipfile(path):
            return _open_zips(settings, [path], where)
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error}).") from error
    return None


def refuse_options_of_pairs(settings: SourceSettings, where: str) -> None:
    """Refuse options that would have no effect, since names of files do not tell what is a pair.

    Raises:
        ConfigError: naming the option to give instead.
    """
    for option, instead in (
        ("conditioning_data_dir", "--conditioning-image-column"),
        ("caption_extension", "--caption-column"),
    ):
        if getattr(settings, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(
                f"{where}: {flag} goes with files that belong together by their names, and these "
                f"rows say what belongs to them: see {instead}."
            )


def _open_folder(settings: SourceSettings, path: Path, where: str) -> Source | None:
    if settings.dataset_config_name is not None or any((path / name).is_file() for name in SAVED):
        return None
    tree = Folder(path)
    survey = take_survey(tree, caption_endings(settings))
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
    if tree.num_replaced:
        source.remarks.append(
            f"not read: {tree.num_replaced} members of which the zip has a later one"
        )
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
        source = _open_tables(settings, tree, kept, where, folder)
        _remark_splits(source, tree, left_out)
        others = [one for one in survey.prompts if one not in prompts]
        others += survey.metadata + survey.tables + elsewhere
        _remark(source, "tables and tars that are not read", others)
        return source
    if _counts(survey.metadata, elsewhere, tree, settings):
        return _open_metadata(settings, tree, survey, where, folder)
    tables = [name for name in survey.tables if has_images(tree, name, settings)]
    others = [name for name in survey.tables if name not in tables]
    if tables:
        if len({ending(name) for name in tables}) > 1 or elsewhere:
            raise _two_tables(where, [*tables, *elsewhere])
        kept, left_out = of_split(tables, settings.split, where)
        source = _open_tables(settings, tree, kept, where, folder)
        _remark_splits(source, tree, left_out)
        _remark(source, "tables without images, not read", others)
        return source
    can_pair = settings.caption is not None or survey.num_captioned
    if elsewhere:
        if survey.num_captioned:
            raise ConfigError(
                f"{where}: two data sets, {survey.num_pictures} pictures with captions and "
                f"{first_few(elsewhere)}: give one as the path."
            )
        return None
    if others and not can_pair:
        _open_tables(settings, tree, others[:1], where, folder)  # says which column is missing
    if not survey.picture_folders:
        return None
    source = open_pairs(settings, tree, survey, where)
    _remark(source, "tables without images, not read", others)
    _remark(source, "zips that are not read", survey.zips)
    return source


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
    source = _open_tables(settings, tree, kept, where, folder)
    _remark_splits(source, tree, left_out)
    _remark(source, "tables that are not read", survey.tables)
    return source


def _open_tables(
    settings: SourceSettings, tree: Tree, tables: list[str], where: str, folder: Path | None
) -> Source:
    """Return the rows of tables of text."""
    is_prompts = tables[0].rpartition("/")[2] == PROMPTS
    refuse_options_of_pairs(settings, f"{where}, {tables[0]}")
    names = prompt_json_names(settings) if is_prompts else column_names(settings)
    rows = read_tables(tree, tables, names, where)
    trees, zips = [tree], list[str]()
    if folder is not None:
        zips = sorted(one.name for one in folder.iterdir() if ending(one.name) == "zip")
        if zips and not _has_files(rows, tree):
            trees.append(Zips([folder / name for name in zips], where))
    layout = f"ControlNet's {PROMPTS}" if is_prompts else f"table {tables[0]}"
    if len(tables) > 1:
        layout = f"{len(tables)} tables ({first_few(tables)})"
    if len(trees) > 1:
        layout += f", and files in {first_few(zips)}"
    remarks = CountedNames()
    remarks.add("", zips if len(trees) == 1 else [])
    finder = Finder(trees)
    return Listed(
        rows,
        {"image": finder, "conditioning_image": finder},
        layout,
        remarks.remark("zips that are not read"),
        has_conditioning_images=settings.wants_conditioning,
    )


def _has_files(rows: StoredRows, tree: Tree) -> bool:
    """Tell whether the files of a table's first rows, as far as they name any, are in a tree."""
    finder = Finder([tree])
    return all(
        finder.has(name, rows.folder(index))
        for index in range(min(len(rows), NUM_TRIED))
        for name in (rows[index].image, rows[index].conditioning_image)
        if name
    )


def _two_tables(where: str, names: list[str]) -> ConfigError:
    return ConfigError(f"{where}: two tables or more, {first_few(names)}: give one as the path.")


def _remark(source: Source, text: str, names: list[str]) -> None:
    """Add a remark on files, if there are any."""
    counted = CountedNames()
    counted.add("", names)
    source.remarks += counted.remark(text)


def _remark_splits(source: Source, tree: Tree, left_out: dict[str, list[str]]) -> None:
    """Add remarks on the rows of tables that belong to splits which are not read."""
    for split, tables in left_out.items():
        num_rows = sum(count_records(tree, table) for table in tables)
        source.remarks.append(left_out_remark(num_rows, split))
