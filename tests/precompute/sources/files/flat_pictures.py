"""Pictures of one flat colour, so that any mispairing shows.

Row n has a picture of the grey level 10 (n + 1), a conditioning image of half that, and the caption
`number n`.
"""

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings


def level(number: int) -> int:
    return 10 * (number + 1)


def picture(grey: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (4, 4), grey).save(data, "PNG")
    return data.getvalue()


def caption(number: int) -> str:
    return f"number {number}"


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_image(path: Path, number: int) -> Path:
    return write(path, picture(level(number)))


def write_control(path: Path, number: int) -> Path:
    return write(path, picture(level(number) // 2))


def write_pair(folder: Path, number: int, name: str = "") -> None:
    """A picture `images/n.png` and its conditioning image `edges/n.png`."""
    write_image(folder / "images" / f"{name or number}.png", number)
    write_control(folder / "edges" / f"{name or number}.png", number)


def captioned(folder: Path, inside: range = range(4), ending: str = ".txt") -> Path:
    """Pictures `n.png`, each with its caption in a file beside it."""
    for number in inside:
        write_image(folder / f"{number}.png", number)
        write(folder / f"{number}{ending}", f"{caption(number)}\n")
    return folder


def record(number: int, image: str = "", control: str = "") -> dict[str, Any]:
    return {
        "file_name": image or f"images/{number}.png",
        "conditioning_image_file_name": control or f"edges/{number}.png",
        "text": caption(number),
    }


def lines(records: Iterable[object]) -> str:
    return "\n".join(one if isinstance(one, str) else json.dumps(one) for one in records)


def zipped(folder: Path, archive: Path, prefix: str = "") -> Path:
    """Pack a folder; the zip is all that is left of it."""
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, prefix + path.relative_to(folder).as_posix())
                path.unlink()
    return archive


def opened(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(train_data_dir=str(path), **settings))


def photographs(path: Path, **settings: Any) -> Source:
    """Open a data set whose conditioning images are drawn."""
    return opened(path, wants_conditioning=False, **settings)


def numbers(source: Source) -> list[int]:
    """Return the number of each row; fail where image, conditioning image and caption differ."""
    found = []
    for index, row in enumerate(source.rows(range(len(source)))):
        assert not row.fault, row
        with Image.open(io.BytesIO(source.read(index, "image"))) as image:
            number = image.getpixel((0, 0)) // 10 - 1
        if source.has_conditioning_images:
            with Image.open(io.BytesIO(source.read(index, "conditioning_image"))) as control:
                assert control.getpixel((0, 0)) == level(number) // 2, row
        assert row.prompt == caption(number), row
        found.append(number)
    return found
