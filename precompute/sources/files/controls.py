"""Where the conditioning images of a tree's images lie, if they have their names."""

import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError
from precompute.sources.files.folder import Folder
from precompute.sources.files.tree import Tree, is_picture
from precompute.sources.files.zips import Zips

# Folders that hold conditioning images, and those beside them that hold the images. `source` is the
# conditioning image where `target` is beside it, as in ControlNet's own data set.
CONTROL_FOLDERS = ("conditioning_images", "conditioning_image", "conditioning")
IMAGE_FOLDERS = ("images", "image")
SOURCE, TARGET = "source", "target"


@dataclass(frozen=True)
class ControlFolders:
    """The folders of conditioning images.

    Attributes:
        tree: that they lie in.
        by_images: name of the folder of conditioning images, by that of the images' folder.
        in_images_tree: folders of conditioning images among those of the images.
        read: those of them that are read.
    """

    tree: Tree
    by_images: Mapping[str, str]
    in_images_tree: frozenset[str]
    read: frozenset[str]


def named_control_folders(tree: Tree, folders: Iterable[str], where: str) -> ControlFolders:
    """Return the folders of conditioning images that are called so.

    Args:
        tree: of all pictures.
        folders: that hold pictures.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: one folder of images has two of them.
    """
    all_folders = {one.lower(): one for folder in folders for one in _with_those_above(folder)}
    by_images: dict[str, str] = {}
    of_controls = set()
    for folder in folders:
        images = _images_folder(folder, all_folders)
        if images is None:
            continue
        of_controls.add(folder)
        if other := by_images.get(images):
            raise ConfigError(
                f"{where}: two folders of conditioning images, {other} and {folder}. Choose one: "
                "--conditioning-data-dir."
            )
        by_images[images] = folder
    return ControlFolders(tree, by_images, frozenset(of_controls), frozenset(of_controls))


def open_controls(given: str) -> Tree:
    """Return the folder, or zip, of conditioning images that the user gave.

    Raises:
        ConfigError: there is none, or no picture in it.
        OSError: a folder cannot be read.
    """
    path, where = Path(given).expanduser(), f"--conditioning-data-dir {given}"
    if not path.exists():
        raise ConfigError(f"{where}: no such file or folder.")
    controls: Tree = Folder(path) if path.is_dir() else Zips([path], where)
    if not any(is_picture(name) for _, files in controls.folders() for name in files):
        raise ConfigError(f"{where}: holds no pictures.")
    return controls


def folder_within(inner: Tree, outer: Tree) -> str | None:
    """Return the name of a tree's folder in another tree; None if it does not lie there."""
    if not (isinstance(inner, Folder) and isinstance(outer, Folder)):
        return None
    found = os.path.relpath(os.path.realpath(inner.root), os.path.realpath(outer.root))
    return None if found.startswith("..") else found


def given_control_folders(
    given: str, tree: Tree, folders: Iterable[str], named: ControlFolders
) -> ControlFolders:
    """Return the folders of conditioning images in the folder, or zip, that the user gave.

    It holds them as the tree holds the images: in folders of the same names, counted from the
    tree's root or from the folder that all images lie in.

    Args:
        given: the folder or zip.
        tree: of the images.
        folders: of the tree that hold pictures.
        named: those that are called so, which hold no images.

    Raises:
        ConfigError: there is no such folder or zip, or no picture in it.
        OSError: a folder cannot be read.
    """
    controls = open_controls(given)
    found = {folder for folder, files in controls.folders() if any(map(is_picture, files))}
    inner = folder_within(controls, tree)
    read = {one for one in folders if inner and f"{one}/".startswith(f"{inner}/")}
    own = named.in_images_tree | read
    images = [folder for folder in folders if folder not in own]
    by_images = {one: one for one in images}
    if images and not found.intersection(images):
        top = os.path.commonpath(images) if "" not in images else ""
        by_images = {one: _below(one, top) for one in images}
    return ControlFolders(controls, by_images, own, frozenset(read))


def _below(folder: str, top: str) -> str:
    return folder.removeprefix(top).removeprefix("/")


def _with_those_above(folder: str) -> Iterable[str]:
    while folder:
        yield folder
        folder = posixpath.dirname(folder)


def _images_folder(folder: str, all_folders: Mapping[str, str]) -> str | None:
    """Return where the images lie whose conditioning images lie in a folder; None if none do.

    Args:
        folder: its name.
        all_folders: names of all folders, by the same in lower case.
    """
    parts = folder.split("/")
    for at in reversed(range(len(parts))):
        name, above, rest = parts[at].lower(), parts[:at], parts[at + 1 :]
        beside = [TARGET] if name == SOURCE else list(IMAGE_FOLDERS)
        found = [all_folders.get("/".join([*above, one]).lower()) for one in beside]
        of_images = [one for one in found if one is not None]
        if name in CONTROL_FOLDERS or (name == SOURCE and of_images):
            return "/".join([*(of_images[:1] or above), *rest])
    return None
