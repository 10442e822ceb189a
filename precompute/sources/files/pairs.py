"""Rows from files that belong together by their names: images, captions, conditioning images."""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from common.errors import ConfigError
from precompute.sources.counted import Counted, first_few, remark
from precompute.sources.files.controls import (
    ControlFolders,
    given_control_folders,
    named_control_folders,
)
from precompute.sources.files.listed import Listed, WithCaptionFiles
from precompute.sources.files.stored_rows import Entry, StoredRows
from precompute.sources.files.survey import (
    Survey,
    caption_endings,
    captioned_stem,
    has_ending,
    of_split,
)
from precompute.sources.files.tree import Finder, Tree, is_picture, stem
from precompute.sources.source import Source, SourceSettings
from precompute.sources.splits import claimed_split, left_out_remark

NO_CAPTIONS = (
    "Put each into a text file beside its image (1.txt for 1.png), or list them in metadata.jsonl, "
    'a line each: {"file_name": "1.png", "text": "…"}; or give one for all: --caption "…", which '
    "may be empty, and in which {name} stands for the file's name."
)
NO_CONTROLS = (
    "Put them into a folder of their own, conditioning/, in which they have the images' names; or "
    "give that folder, --conditioning-data-dir; or have them drawn from the images, "
    "--conditioning-from canny."
)


OWN_FOLDER = "Conditioning images belong into a folder of their own, such as conditioning/"


@dataclass
class _Tally:
    """How many files of the folders are read, and which are not."""

    num_controls: int = 0
    captions: Counted[str] = field(default_factory=Counted)
    second_captions: Counted[str] = field(default_factory=Counted)
    controls: Counted[str] = field(default_factory=Counted)
    others: Counted[str] = field(default_factory=Counted)

    def remarks(self, settings: SourceSettings) -> list[str]:
        """Return a line for each kind of files that are not read."""
        why = "without an image" if settings.caption is None else "beside --caption"
        why_controls = "without an image" if settings.wants_conditioning else "since they are drawn"
        return [
            *self.captions.remark(f"caption files that are not read, {why}"),
            *self.second_captions.remark("second caption files of an image, not read"),
            *self.controls.remark(f"conditioning images that are not read, {why_controls}"),
            *self.others.remark("other files, not read"),
        ]


@dataclass(frozen=True)
class _Folder:
    """The files of a folder by their stems, and its conditioning images.

    Attributes:
        path: of the folder.
        control_path: of the folder of its conditioning images; empty also if there is none.
        images: names of its pictures, in a good row one of a stem.
        captions: names of its caption files, of several with one stem in the endings' order.
        controls: names of its conditioning images.
        others: names of its other files.
        control_others: the same of the folder of conditioning images, if it is another.
    """

    path: str
    control_path: str
    images: dict[str, list[str]]
    captions: dict[str, list[str]]
    controls: dict[str, list[str]]
    others: list[str]
    control_others: list[str]

    def entries(self, *, captions: bool) -> Iterator[Entry]:
        """Yield the rows; their prompts are names of caption files, if these are wanted."""
        for own, names in self.images.items():
            controls = self.controls.get(own, [])
            own_captions = self.captions.get(own, []) if captions else []
            fault = (
                f"two conditioning images: {controls[0]} and {controls[1]}" if controls[1:] else ""
            )
            if names[1:]:
                fault = f"two images of one name: {names[0]} and {names[1]}. {OWN_FOLDER}"
            yield Entry(
                posixpath.join(self.path, names[0]),
                posixpath.join(self.control_path, controls[0]) if controls else "",
                posixpath.join(self.path, own_captions[0]) if own_captions else None,
                fault,
            )

    def count(self, tally: _Tally, *, captions: bool) -> None:
        """Count what is read, and what is not."""
        stems = self.images.keys()
        tally.num_controls += len(stems & self.controls.keys())
        for own, names in self.captions.items():
            if own in stems and captions:
                tally.second_captions.add(_in(self.path, names[1:]))
            else:
                tally.captions.add(_in(self.path, names))
        for own in self.controls.keys() - stems:
            tally.controls.add(_in(self.control_path, self.controls[own]))
        tally.others.add(_in(self.path, self.others))
        tally.others.add(_in(self.control_path, self.control_others))


@dataclass(frozen=True)
class _Lister:
    """Lists folders.

    Attributes:
        tree: of the images.
        controls: where their conditioning images lie.
        endings: of caption files.
        settings: what the rows need.
        known: paths of files that are told of elsewhere.
    """

    tree: Tree
    controls: ControlFolders
    endings: tuple[str, ...]
    settings: SourceSettings
    known: frozenset[str]

    def folder(self, path: str) -> _Folder:
        """Return the files of a folder."""
        files = [
            one for one in self.tree.files(path) if posixpath.join(path, one) not in self.known
        ]
        images = _by_stem((stem(name), name) for name in filter(is_picture, files))
        captions = [name for name in files if has_ending(name, self.endings)]
        captions.sort(key=lambda name: [has_ending(name, (one,)) for one in self.endings])
        wanted = self.settings.wants_conditioning
        control_path = self.controls.by_images.get(path) if wanted else None
        control_files = [] if control_path is None else self.controls.tree.files(control_path)
        return _Folder(
            path,
            control_path or "",
            images,
            _by_stem(
                (captioned_stem(name, self.endings, images), name) for name in reversed(captions)
            ),
            _by_stem((stem(name), name) for name in filter(is_picture, control_files)),
            [name for name in files if not is_picture(name) and not has_ending(name, self.endings)],
            [name for name in control_files if not is_picture(name)],
        )


def open_pairs(settings: SourceSettings, tree: Tree, survey: Survey, where: str) -> Source:
    """Return the rows of a tree's pictures.

    Args:
        settings: what the rows need.
        tree: the files.
        survey: of the tree.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: there are no captions, or no conditioning images.
        OSError: a folder cannot be read.
    """
    endings = caption_endings(settings)
    if settings.caption is None and not survey.captioned.count:
        tables = remark(" Tables, each of which can be given", survey.inner_tables)
        looked = " or ".join(f".{one}" for one in endings)
        raise ConfigError(
            f"{where}: {survey.num_pictures} images and no captions; no {looked} file has the name "
            f"of an image. {NO_CAPTIONS}{''.join(tables)}"
        )
    controls = _control_folders(settings, tree, survey, where)
    images = [one for one in survey.picture_folders if one not in controls.in_images_tree]
    if not images:
        raise ConfigError(f"{where}: holds conditioning images and no images.")
    kept, left_out = of_split(images, settings.split, where)
    tally = _Tally(others=survey.elsewhere)
    rows = StoredRows([""], "row")
    lister = _Lister(tree, controls, endings, settings, frozenset(survey.aside + survey.zips))
    for path in kept:
        folder = lister.folder(path)
        folder.count(tally, captions=settings.caption is None)
        for entry in folder.entries(captions=settings.caption is None):
            rows.append(len(rows), entry)
    rows.end_table()
    if settings.wants_conditioning and not tally.num_controls:
        raise ConfigError(
            f"{where}: none of its {len(rows)} images has a conditioning image of its name. "
            f"{NO_CONTROLS}"
        )
    remarks = [
        left_out_remark(sum(map(len, (_pictures(tree, path) for path in paths))), split)
        for split, paths in left_out.items()
    ]
    used = {controls.by_images.get(path) for path in kept} if controls.tree is tree else set()
    unread = controls.in_images_tree
    if settings.wants_conditioning:
        unread = unread - used if controls.tree is tree else unread - controls.read
    for path in sorted(unread):
        if claimed_split(PurePosixPath(path)) not in left_out:
            tally.controls.add(_in(path, _pictures(tree, path)))
            tally.others.add(_in(path, [one for one in tree.files(path) if not is_picture(one)]))
    source = Listed if settings.caption is not None else WithCaptionFiles
    return source(
        rows,
        {"image": Finder([tree]), "conditioning_image": Finder([controls.tree])},
        _layout(settings, endings, controls, kept),
        [*remarks, *tally.remarks(settings)],
        has_conditioning_images=settings.wants_conditioning,
    )


def has_controls(settings: SourceSettings, tree: Tree, survey: Survey, where: str) -> bool:
    """Tell whether pictures have conditioning images by their names, as far as they need any."""
    if not settings.wants_conditioning or settings.conditioning_data_dir is not None:
        return True
    try:
        return bool(named_control_folders(tree, survey.picture_folders, where).by_images)
    except ConfigError:
        return False


def _control_folders(
    settings: SourceSettings, tree: Tree, survey: Survey, where: str
) -> ControlFolders:
    named = named_control_folders(tree, survey.picture_folders, where)
    given = settings.conditioning_data_dir
    if given is not None and settings.wants_conditioning:
        return given_control_folders(given, tree, survey.picture_folders, named)
    if settings.wants_conditioning and not named.by_images:
        raise ConfigError(f"{where}: no conditioning images. {NO_CONTROLS}")
    return named


def _in(folder: str, names: list[str]) -> list[str]:
    return [posixpath.join(folder, name) for name in names]


def _by_stem(names: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for own, name in names:
        found.setdefault(own, []).append(name)
    return found


def _pictures(tree: Tree, path: str) -> list[str]:
    return list(filter(is_picture, tree.files(path)))


def _layout(
    settings: SourceSettings, endings: tuple[str, ...], controls: ControlFolders, kept: list[str]
) -> str:
    """Return the layout in words."""
    parts = ["images"]
    if settings.caption is None:
        parts.append(f"caption files of their names ({' or '.join(f'.{one}' for one in endings)})")
    if settings.wants_conditioning:
        folders = sorted({controls.by_images[path] for path in kept if path in controls.by_images})
        given = settings.conditioning_data_dir
        place = first_few([f"{path}/" for path in folders]) if given is None else given
        parts.append(f"conditioning images of their names in {place}")
    return " and ".join(parts) if len(parts) < 3 else f"{parts[0]}, {parts[1]} and {parts[2]}"
