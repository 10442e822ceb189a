"""fill50k as a folder and as a zip, and what is not fill50k."""

import json
import zipfile
from pathlib import Path

import pytest

from precompute.sources import Row, open_source, parse_rows
from shards.errors import ConfigError

LINE = {"source": "source/0.png", "target": "target/0.png", "prompt": "a circle"}


def pack(folder: Path, archive: Path, prefix: str) -> Path:
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("__MACOSX/fill50k/prompt.json", "resource fork")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.write(path, prefix + path.relative_to(folder).as_posix())
    return archive


@pytest.mark.parametrize("prefix", ["fill50k/", ""])
def test_a_zip_reads_as_the_folder_it_unpacks_to(
    circles: Path, tmp_path: Path, prefix: str
) -> None:
    folder = open_source(circles)
    packed = open_source(pack(circles, tmp_path / "fill50k.zip", prefix))
    assert packed.rows == folder.rows
    assert len(folder.rows) == 10
    for row in folder.rows:
        for name in (row.image, row.conditioning_image):
            assert packed.read(name) == (circles / name).read_bytes() == folder.read(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fill50k.zip"]


def test_a_row_is_named_as_in_prompt_json() -> None:
    data = json.dumps(LINE).encode() + b"\n\n" + json.dumps(LINE | {"prompt": None}).encode()
    assert parse_rows(data, "here") == [
        Row(1, "target/0.png", "source/0.png", "a circle"),
        Row(3, "target/0.png", "source/0.png", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(LINE) + '\n{"source": ', "here, line 2: not JSON"),
        ("[1, 2]", "here, line 1: expected .*no source, target, prompt"),
        (json.dumps({"source": "a", "prompt": "b"}), "here, line 1: expected .*no target"),
        (json.dumps(LINE | {"target": 3}), "here, line 1: source and target must be file names"),
        ("\n \n", "here: holds no rows"),
    ],
)
def test_a_broken_line_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rows(text.encode(), "here")


def test_what_cannot_be_read_is_an_os_error(circles: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(circles / "prompt.json", "prompt.json")
        packed.writestr("source/0.png", bytes(1000))
    data = bytearray((tmp_path / "damaged.zip").read_bytes())
    at = data.index(b"source/0.png") + len(b"source/0.png")
    data[at] ^= 0xFF
    (tmp_path / "damaged.zip").write_bytes(data)
    packed_source, folder = open_source(tmp_path / "damaged.zip"), open_source(circles)
    for source, name in (
        (packed_source, "source/0.png"),
        (packed_source, "source/none.png"),
        (folder, "none.png"),
        (folder, "a\0b"),
    ):
        with pytest.raises(OSError):  # noqa: PT011  (which one is the system's affair)
            source.read(name)


def test_what_is_not_fill50k_says_so(tmp_path: Path, circles: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no prompt\.json in this folder"):
        open_source(tmp_path)
    with pytest.raises(ConfigError, match=r"Did you mean .*fill50k\?"):
        open_source(circles.parent)
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ConfigError, match="neither a folder nor a whole zip"):
        open_source(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as packed:
        packed.writestr("a.txt", "a")
    with pytest.raises(ConfigError, match=r"no prompt\.json in this zip"):
        open_source(tmp_path / "other.zip")
