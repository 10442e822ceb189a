"""The files of a data set's folder."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from precompute.sources.files.folder import Folder


def files_below(path: Path, endings: Sequence[str]) -> tuple[dict[Path, PurePath], int]:
    """Return the files with certain endings in a folder and in those below it, sorted by path.

    Links are followed. Caches, hidden files and what systems leave behind are left out.

    Args:
        path: of the folder; or of a file, which then is the only one.
        endings: in lower case; names may have them in any case.

    Returns:
        each file's path, and the same relative to the folder; and how many other files there are.

    Raises:
        OSError: a folder cannot be read.
    """
    if not path.is_dir():
        return {path: PurePath(path.name)}, 0
    found: list[PurePath] = []
    num_others = 0
    for folder, names in Folder(path).folders():
        matching = [name for name in names if name.lower().endswith(tuple(endings))]
        found += [PurePath(folder, name) for name in matching]
        num_others += len(names) - len(matching)
    return {path / one: one for one in sorted(found, key=str)}, num_others
