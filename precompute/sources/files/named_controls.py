"""Conditioning images that a table does not name: files with the names of its images."""

import posixpath
from itertools import pairwise

from common.errors import ConfigError
from precompute.sources.counted import remark
from precompute.sources.files.controls import folder_within
from precompute.sources.files.stored_rows import Entry, StoredRows
from precompute.sources.files.tree import NUM_TRIED, Tree, is_picture, stem


def with_named_controls(
    rows: StoredRows, images: Tree, controls: Tree, where: str
) -> tuple[StoredRows, list[str]]:
    """Return a table's rows with the conditioning images that have their images' names.

    They lie in folders as the images do, counted from the folder that the most are found from: for
    `train/a/0.png` that may be `train/a/0.png`, `a/0.png` or `0.png`, the same for all rows.

    Args:
        rows: without conditioning images.
        images: where the images lie.
        controls: where the conditioning images lie, to which their names are relative.
        where: the data set as the user gave it, for errors.

    Returns:
        the rows, and remarks on conditioning images that are not read.

    Raises:
        ConfigError: no image has a conditioning image.
        OSError: a folder cannot be read.
    """
    files: dict[str, list[str]] = {}
    for folder, names in controls.folders():
        for name in filter(is_picture, names):
            place = posixpath.join(folder, stem(name))
            files.setdefault(place, []).append(posixpath.join(folder, name))
    first = [_place(rows, index) for index in range(min(len(rows), NUM_TRIED))]
    depths = range(1 + max(place.count("/") for place in first))
    num_found = [sum(_below(place, depth) in files for place in first) for depth in depths]
    top = num_found.index(max(num_found))
    unread = dict.fromkeys(files)
    found = StoredRows(rows.tables, rows.unit)
    found.folders = rows.folders
    for start, end in pairwise([0, *rows.ends]):
        for index in range(start, end):
            entry, place = rows[index], _below(_place(rows, index), top)
            names = files.get(place, [])
            unread.pop(place, None)
            found.append(rows.numbers[index], _with_control(entry, names))
        found.end_table()
    if len(unread) == len(files):
        raise ConfigError(
            f"{where}: none of its {len(rows)} images has a conditioning image of its name."
        )
    if folder_within(controls, images) is None:  # names count as pictures of the images' tree
        found.num_names = rows.num_names
    return found, remark(
        "conditioning images that are not read, without an image",
        [name for place in unread for name in files[place]],
    )


def _with_control(entry: Entry, names: list[str]) -> Entry:
    """Return a row with the one conditioning image that has its image's name."""
    two = f"two conditioning images: {names[0]} and {names[1]}" if names[1:] else ""
    return Entry(entry.image, names[0] if names else "", entry.prompt, entry.fault or two)


def _place(rows: StoredRows, index: int) -> str:
    """Return where a row's image lies, without its ending."""
    name = rows[index].image.replace("\\", "/")
    path = posixpath.normpath(posixpath.join(rows.folder(index), name))
    return posixpath.join(posixpath.dirname(path), stem(path))


def _below(place: str, depth: int) -> str:
    """Return a place without its topmost folders."""
    return "/".join(place.split("/")[depth:])
