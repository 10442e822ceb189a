"""Which split of a data set a file belongs to, as its name says, and which split is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from common.errors import ConfigError

# Further names of a split, as the hub knows them.
SYNONYMS = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
NAMES = {"train", "validation", "test", *SYNONYMS}
# Words that say what the files are, not which.
GENERIC = {"data", "dataset", "set", "split", "captions", "metadata"}
GENERIC |= {"images", "image", "imgs", "img", "pictures", "photos"}
WORD = re.compile(r"[^\W\d_]+")
# What the hub itself calls the files of a split.
OF_SEVERAL = re.compile(r"(?:.*[-_.])?([a-z]+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")


def claimed_split(path: PurePath) -> str | None:
    """Return the split that a file claims to be of.

    A name claims a split if its last word is the split's, numbers and words such as "images" aside:
    `test.tar`, `test-003.tar`, `cars_test.tar`, `test_images/`, `any-test-00000-of-00005.parquet`,
    but not `test-drive.tar`.

    Args:
        path: of the file, relative to the data set's folder. The file's own name decides, then that
            of the folder around it, and so on.

    Returns:
        None if it claims none.
    """
    for part in [path.name.partition(".")[0], *reversed(path.parts[:-1])]:
        several = OF_SEVERAL.fullmatch(part.lower())
        words = [several[1]] if several else WORD.findall(part.lower())
        last = next((word for word in reversed(words) if word not in GENERIC), "")
        if last in NAMES:
            return standard_name(last)
    return None


def standard_name(split: str) -> str:
    """Return the usual name of a split: `validation` for `val`."""
    return SYNONYMS.get(split.lower(), split)


def choose_split(splits: Iterable[str | None], wanted: str | None, where: str) -> str | None:
    """Return the split that is read.

    Args:
        splits: those that there are; None for what belongs to no split.
        wanted: the split that the user asked for.
        where: the data set as the user named it, for errors.

    Returns:
        The wanted one; else `train`, or the only one, or None: what belongs to no split.

    Raises:
        ConfigError: there is no such split; or several, none is `train` and none is asked for.
    """
    found = list(dict.fromkeys(splits))
    named = [split for split in found if split is not None]
    has = f"it has {', '.join(named)}" if named else "none of its files names a split"
    if wanted is not None:
        for split in (wanted, standard_name(wanted)):
            if split in named:
                return split
        raise ConfigError(f"{where}: no split {wanted!r}; {has}.")
    if "train" in named:
        return "train"
    if None in found:
        return None
    if len(named) == 1:
        return named[0]
    raise ConfigError(f"{where}: no split 'train'; {has}. Choose one: --split {named[0]}.")


def files_of_split(
    files: Mapping[Path, PurePath], wanted: str | None, where: str
) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the files that are read, and those that are not, by split.

    Files that claim no split are read with those of `train`; with a split that the user asked for
    they are not.

    Args:
        files: paths of the files, and the same relative to the data set's folder.
        wanted: the split that the user asked for.
        where: the data set as the user named it, for errors.

    Raises:
        ConfigError: as `choose_split`.
    """
    claims = {file: claimed_split(relative) for file, relative in files.items()}
    chosen = choose_split(claims.values(), wanted, where)
    kept: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    for file, split in claims.items():
        if split == chosen or (split is None and wanted is None):
            kept.append(file)
        else:
            left_out.setdefault(split or "", []).append(file)
    return kept, left_out


def left_out_remark(count: int, split: str) -> str:
    """Return the remark on rows of a split that is not read; an empty name is that of none."""
    of = f"split {split!r}" if split else "files that name no split"
    return f"left out: {count} {'row' if count == 1 else 'rows'} of {of}"
