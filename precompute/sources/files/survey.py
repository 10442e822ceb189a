"""What there is in a tree of files, before it is known how it is to be read."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from common.errors import ConfigError
from precompute.sources.counted import Counted, first_few
from precompute.sources.files.records import TABLES
from precompute.sources.files.text_tables import PROMPTS
from precompute.sources.files.tree import TAR, Tree, ending, is_picture, stem
from precompute.sources.source import SourceSettings
from precompute.sources.splits import files_of_split
from sd3.image_files import LFS_POINTER

METADATA = ("metadata.jsonl", "metadata.csv")
# What the hub keeps beside a data set, and tells nothing of its rows.
NO_TABLES = ("dataset_infos.json", "dataset_info.json")
CAPTIONS = ("txt", "caption")
BINARY_TABLES = {"parquet", "arrow"}


@dataclass
class Survey:
    """The files of a tree, by what they may be.

    Attributes:
        picture_folders: the folders that hold pictures.
        num_pictures: how many there are.
        captioned: the caption files beside them.
        prompts: names of the files that are called prompt.json.
        metadata: names of image folders' tables.
        tables: names of other tables of text, in the topmost folder.
        binary_tables: names of Parquet and Arrow files.
        tars: names of tars.
        zips: names of zips in the topmost folder.
        inner_tables: names of other tables of text, in the folders below.
        aside: names of tables that may lie beside the data set, but are not it.
        elsewhere: other files, in folders without pictures.
    """

    picture_folders: list[str] = field(default_factory=list)
    num_pictures: int = 0
    captioned: Counted[str] = field(default_factory=Counted)
    prompts: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    binary_tables: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    zips: list[str] = field(default_factory=list)
    inner_tables: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    elsewhere: Counted[str] = field(default_factory=Counted)


def take_survey(tree: Tree, endings: tuple[str, ...]) -> Survey:
    """Return what there is in a tree.

    Args:
        tree: the files.
        endings: of caption files.

    Raises:
        OSError: a folder cannot be read.
    """
    survey = Survey()
    for folder, files in tree.folders():
        pictures = [name for name in files if is_picture(name)]
        if pictures:
            survey.picture_folders.append(folder)
            survey.num_pictures += len(pictures)
        # Most files are pictures, by the million, so of these no more is asked.
        own = set(pictures).difference(name for name in pictures if has_ending(name, endings))
        others = [name for name in files if name not in own]
        stems = {stem(name) for name in pictures} if others else set()
        for name in others:
            path = f"{folder}/{name}" if folder else name
            kind = ending(name)
            if pictures and has_ending(name, endings):
                if captioned_stem(name, endings, stems) in stems:
                    survey.captioned.add([path])
            elif name.lower() == PROMPTS:
                survey.prompts.append(path)
            elif name.lower() in METADATA:
                survey.metadata.append(path)
            elif kind in BINARY_TABLES:
                survey.binary_tables.append(path)
            elif name.lower().endswith(TAR):
                survey.tars.append(path)
            elif kind == "zip" and folder in tree.tops:
                survey.zips.append(path)
            # A table beside each picture, as img2dataset writes, describes that picture alone.
            elif folder in tree.tops and _is_table(name) and stem(name) not in stems:
                survey.tables.append(path)
            else:
                if _is_table(name) and stem(name) not in stems:
                    survey.inner_tables.append(path)
                if not pictures:
                    survey.elsewhere.add([path])
    return survey


def refuse_pointers(tree: Tree, names: Sequence[str], where: str) -> None:
    """Raise if files that are to be read are still to be fetched by Git LFS.

    Args:
        tree: the files.
        names: of those that are to be read.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: naming the first of them, and the command that fetches them.
        OSError: a file cannot be read.
    """
    pointers = [name for name in names if _starts_with(tree, name, LFS_POINTER)]
    if pointers:
        raise ConfigError(
            f"{where}: {first_few(pointers)}: pointers of Git LFS, and the files are still to be "
            "fetched: git lfs pull"
        )


def _starts_with(tree: Tree, name: str, start: bytes) -> bool:
    with tree.open(name) as file:
        return file.read(len(start)) == start


def _is_table(name: str) -> bool:
    return ending(name) in TABLES and name not in NO_TABLES


def caption_endings(settings: SourceSettings) -> tuple[str, ...]:
    """Return the endings of caption files, in lower case and without the dot."""
    own = settings.caption_extension
    return CAPTIONS if own is None else (own.removeprefix(".").lower(),)


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Tell whether a file's name has one of these endings."""
    return name.lower().endswith(tuple(f".{one}" for one in endings))


def captioned_stem(name: str, endings: tuple[str, ...], stems: Collection[str]) -> str:
    """Return the stem of the picture that a caption file is of: `1`, of `1.txt` and `1.png.txt`.

    Args:
        name: of the caption file.
        endings: that caption files have, which may have dots.
        stems: of the pictures in its folder.
    """
    found = max((one for one in endings if has_ending(name, (one,))), key=len)
    own = stem(f"{name[: -len(found) - 1]}.x")
    return own if own in stems or not is_picture(own) else stem(own)


def of_split(
    names: list[str], wanted: str | None, where: str
) -> tuple[list[str], dict[str, list[str]]]:
    """Return the files or folders of the split that is read, and the others by split.

    Raises:
        ConfigError: there is no such split; or several, none is `train` and none is asked for.
    """
    paths = {Path(name): PurePath(name) for name in names}
    by_path = dict(zip(paths, names, strict=True))
    kept, left_out = files_of_split(paths, wanted, where)
    others = {split: [by_path[path] for path in files] for split, files in left_out.items()}
    return [by_path[path] for path in kept], others
