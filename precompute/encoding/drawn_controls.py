"""Conditioning images that an annotator has drawn and the VAE has not yet encoded, on disk.

A file a shard, a zip of PNGs beside the shard's tar. It is written whole or not at all, belongs to
one identity of the product, and goes when the shard is there.
"""

import io
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from xxhash import xxh3_64_hexdigest

from common.atomic_files import atomic_file
from common.errors import ShardError
from precompute.encoding.shard_build import ShardBuild
from sd3.image_files import BadImage
from shards.format import sidecar

SUFFIX = ".drawn.zip"
IMAGE, REASON = ".png", ".txt"


def drawn_path(build: ShardBuild) -> Path:
    """Return where the drawn conditioning images of a shard are kept."""
    return sidecar.tar_path(build.product.folder, build.plan.shard).with_suffix(SUFFIX)


class DrawnControl(NamedTuple):
    """What was drawn for a position of a shard: a PNG, or as text why there is nothing.

    Attributes:
        position: in the shard's plan.
        ending: `IMAGE` or `REASON`.
        data: the bytes.
    """

    position: int
    ending: str
    data: bytes


def encode_drawn(position: int, drawn: Image.Image | BadImage) -> DrawnControl:
    """Return a drawn image, or why there is none, as it is kept on disk."""
    if isinstance(drawn, BadImage):
        return DrawnControl(position, REASON, str(drawn).encode())
    file = io.BytesIO()
    bands = drawn.split()
    is_grey = all(band.tobytes() == bands[0].tobytes() for band in bands[1:])
    (bands[0] if is_grey else drawn).save(file, "PNG", compress_level=1)
    return DrawnControl(position, IMAGE, file.getvalue())


def write_drawn(build: ShardBuild, drawn: Iterable[DrawnControl]) -> None:
    """Write what was drawn for a shard.

    Raises:
        OSError: the file cannot be written.
    """
    build.product.folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(drawn_path(build)) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        archive.comment = build.product.identity_digest.encode()
        for position, ending, data in drawn:
            archive.writestr(f"{_name(build, position)}{ending}", data)


def is_drawn(build: ShardBuild, positions: Iterable[int]) -> bool:
    """Tell whether the images of some positions are there, as they are to be drawn now."""
    try:
        with zipfile.ZipFile(drawn_path(build)) as archive:
            names = {name.rpartition(".")[0] for name in archive.namelist()}
            is_ours = archive.comment == build.product.identity_digest.encode()
    except (OSError, zipfile.BadZipFile):
        return False
    return is_ours and all(_name(build, position) in names for position in positions)


class DrawnShard:
    """Reads the drawn images of a shard; safe to use from several threads.

    Args:
        build: the shard.
    """

    def __init__(self, build: ShardBuild) -> None:
        self.build = build
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()

    def image(self, position: int) -> Image.Image:
        """Return the conditioning image of a position.

        Raises:
            BadImage: there is none, and why.
            ShardError: the file has vanished or is damaged.
        """
        path, name = drawn_path(self.build), _name(self.build, position)
        try:
            with self._lock:
                # Opened once: its directory is read whole, which takes longer than a picture.
                archive = self._archive = self._archive or zipfile.ZipFile(path)
                ending = IMAGE if f"{name}{IMAGE}" in archive.NameToInfo else REASON
                data = archive.read(f"{name}{ending}")
            if ending == REASON:
                raise BadImage(data.decode())
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ShardError(
                f"{path}: changed while precompute was running ({error}); run again"
            ) from error


def _name(build: ShardBuild, position: int) -> str:
    """Return the name of an image: it changes with the record, the background included."""
    return f"{build.keys[position]}-{xxh3_64_hexdigest(build.metadata[position])}"
