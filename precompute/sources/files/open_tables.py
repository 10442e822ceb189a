"""Rows from tables of text, and the folder, tree or zip that the tables' file names mean."""

import posixpath
from pathlib import Path

from common.errors import ConfigError
from precompute.sources.counted import first_few, remark
from precompute.sources.files.controls import open_controls
from precompute.sources.files.listed import Listed
from precompute.sources.files.named_controls import with_named_controls
from precompute.sources.files.stored_rows import StoredRows
from precompute.sources.files.text_tables import (
    PROMPTS,
    column_names,
    prompt_json_names,
    read_tables,
)
from precompute.sources.files.tree import NUM_TRIED, Finder, Tree, ending, folder_of_names, is_junk
from precompute.sources.files.zips import ZipFolders, Zips
from precompute.sources.source import SourceSettings


def refuse_options_of_pairs(
    settings: SourceSettings, where: str, *, has_table: bool = False
) -> None:
    """Refuse options that would have no effect, since names of files do not tell what is a pair.

    Args:
        settings: with the options.
        where: the data set, for errors.
        has_table: whether it is a table of text: it may leave conditioning images to their names.

    Raises:
        ConfigError: naming the option to give instead.
    """
    instead = {"caption_extension": "--caption-column"}
    if not has_table:
        instead["conditioning_data_dir"] = "--conditioning-image-column"
    for option, other in instead.items():
        if getattr(settings, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise ConfigError(
                f"{where}: {flag} goes with files that belong together by their names, and these "
                f"rows say what belongs to them: see {other}."
            )


def open_tables(
    settings: SourceSettings, tree: Tree, tables: list[str], where: str, folder: Path | None
) -> Listed:
    """Return the rows of tables of text.

    Args:
        settings: what the rows need.
        tree: the files.
        tables: names in it.
        where: the data set as the user gave it, for errors.
        folder: of the tree, in which zips may lie; None if it lies in a zip itself.

    Raises:
        ConfigError: there are no rows, all are broken, or a column is missing.
        OSError: a table cannot be read.
    """
    is_prompts = posixpath.basename(tables[0]).lower() == PROMPTS
    refuse_options_of_pairs(settings, f"{where}, {tables[0]}", has_table=True)
    names = prompt_json_names(settings) if is_prompts else column_names(settings)
    rows = read_tables(tree, tables, names, where)
    given = settings.conditioning_data_dir
    controls = None if given is None else open_controls(given)
    finder, zips = Finder([tree]), _zips_in(folder, given)
    num_found = _find_folders(rows, finder)
    if zips and not num_found:
        finder = Finder([tree, Zips([path for _, path in zips], where)])
        _find_folders(rows, finder)
        read = zips
    else:  # not all of them: for a file that is missing, a zip may have another of its name
        read = _zips_named_as_folders(rows, tree, zips)
        if read:
            finder = Finder([tree, ZipFolders([path for _, path in read], where)])
    layout = f"ControlNet's {PROMPTS}" if is_prompts else f"table {tables[0]}"
    if len(tables) > 1:
        layout = f"{len(tables)} tables ({first_few(tables)})"
    if read:
        layout += f", and files in {first_few([name for name, _ in read])}"
    remarks = remark(
        "zips that are not read", [name for name, path in zips if (name, path) not in read]
    )
    control_finder = finder
    if controls is not None:
        control_finder = Finder([controls])
        rows, unread = with_named_controls(rows, tree, controls, f"{where}, {tables[0]}")
        layout += f", and conditioning images of its images' names in {given}"
        remarks += unread
    return Listed(
        rows,
        {"image": finder, "conditioning_image": control_finder},
        layout,
        remarks,
        has_conditioning_images=settings.wants_conditioning,
    )


def _zips_in(folder: Path | None, of_controls: str | None) -> list[tuple[str, Path]]:
    """Return names and paths of the zips in a folder, sorted, but for that of the controls."""
    controls = None if of_controls is None else Path(of_controls).expanduser().absolute()
    entries = sorted(folder.iterdir()) if folder is not None else []
    return [
        (path.name, path)
        for path in entries
        if ending(path.name) == "zip"
        and not is_junk(path.name)
        and path.is_file()
        and path.absolute() != controls
    ]


def _zips_named_as_folders(
    rows: StoredRows, tree: Tree, zips: list[tuple[str, Path]]
) -> list[tuple[str, Path]]:
    """Return the zips that stand for folders which rows name and which are not there."""
    absent = {path.stem for _, path in zips if not tree.has(path.stem)}
    named: set[str] = set()
    for index in range(len(rows)) if absent else ():
        entry, folder = rows[index], rows.folder(index)
        for name in filter(None, (entry.image, entry.conditioning_image)):
            path = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
            named.add(path.partition("/")[0])
        if absent <= named:
            break
    return [(name, path) for name, path in zips if path.stem in absent & named]


def _find_folders(rows: StoredRows, finder: Finder) -> int:
    """Find what each table's file names are relative to, and count the first files that exist."""
    num_found, start = 0, 0
    for number, (table, end) in enumerate(zip(rows.tables, rows.ends, strict=True)):
        entries = [rows[index] for index in range(start, min(end, start + NUM_TRIED // 2))]
        names = [name for one in entries for name in (one.image, one.conditioning_image) if name]
        own = posixpath.dirname(table)
        rows.folders[number], found = folder_of_names(finder, own, names)
        num_found += found
        start = end
    return num_found
