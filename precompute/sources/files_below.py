"""The files of a data set's folder."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from precompute.sources.files.tree import is_junk


def files_below(path: Path, endings: Sequence[str]) -> tuple[dict[Path, PurePath], int]:
    """Return the files with certain endings in a folder and in those below it, sorted by path.

    Links are followed. Hidden files and what systems leave behind are left out.

    Args:
        path: of the folder; or of a file, which then is the only one.
        endings: in lower case; names may have them in any case.

    Returns:
        each file's path, and the same relative to the folder; and how many other files there are.
    """
    if not path.is_dir():
        return {path: PurePath(path.name)}, 0
    found: list[Path] = []
    num_others = 0
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [one for one in folders if not is_junk(one)]
        names = [one for one in names if not is_junk(one)]
        matching = [one for one in names if one.lower().endswith(tuple(endings))]
        found += [Path(folder, one) for one in matching]
        num_others += len(names) - len(matching)
    return {one: one.relative_to(path) for one in sorted(found, key=str)}, num_others
