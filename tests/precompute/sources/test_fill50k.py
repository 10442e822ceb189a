"""fill50k as a folder and as a zip, and what is not fill50k."""

import json
import os
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from precompute.sources import file_versions
from precompute.sources.open_source import open_source
from precompute.sources.source import Row, Source, SourceSettings

LINE = {"source": "source/0.png", "target": "target/0.png", "prompt": "a circle"}


def opened(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(source=str(path), **settings))


def write_lines(folder: Path, *lines: object) -> Path:
    folder.mkdir(exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "prompt.json").write_text("\n".join(texts))
    return folder


def all_rows(source: Source) -> list[Row]:
    return list(source.rows(range(len(source))))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a minute pass, so that the times of files just written tell them apart."""
    now = time.time_ns
    monkeypatch.setattr(file_versions.time, "time_ns", lambda: now() + 60 * 10**9)


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
    folder = opened(circles)
    packed = opened(pack(circles, tmp_path / "fill50k.zip", prefix))
    lines = [json.loads(line) for line in (circles / "prompt.json").open()]
    expected = [
        Row(f"line {number}", line["target"], line["source"], line["prompt"])
        for number, line in enumerate(lines, start=1)
    ]
    for source in (folder, packed):
        assert source.has_conditioning_images
        assert len(source) == 10
        assert all_rows(source) == expected
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(lambda at, s=source: s.read(at, "image"), [*range(10)] * 5))
        assert images == [(circles / row.image).read_bytes() for row in expected] * 5
        for index, row in enumerate(expected):
            conditioning = (circles / row.conditioning_image).read_bytes()
            assert source.read(index, "conditioning_image") == conditioning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fill50k.zip"]


def test_rows_come_in_the_order_asked_for(circles: Path) -> None:
    source = opened(circles)
    assert [row.where for row in source.rows([7, 2])] == ["line 8", "line 3"]
    (row,) = source.rows([4])
    assert row.name == "line 5, target/4.png"


def test_a_row_is_named_as_in_prompt_json(tmp_path: Path) -> None:
    odd = LINE | {"prompt": "half \ud83d"}
    folder = write_lines(tmp_path / "a", LINE, "", LINE | {"prompt": None}, odd)
    expected = [
        Row("line 1", "target/0.png", "source/0.png", "a circle"),
        Row("line 3", "target/0.png", "source/0.png", None),
        Row("line 4", "target/0.png", "source/0.png", "half \ud83d"),
    ]
    source = opened(folder)
    (folder / "prompt.json").write_text("somebody edits it meanwhile")
    assert all_rows(source) == expected


def test_captions_count_once_whatever_they_are() -> None:
    odd = ["a", {"b": 1}, ["c"], "a", {"b": 1}, None, ["c"], None]
    assert Row("row 0", "", "", odd).prompts == ["a", {"b": 1}, ["c"], None]
    assert Row("row 0", "", "", 3).prompts == [3]
    assert Row("row 0", "", "", 3).name == "row 0"


def test_lines_without_conditioning_images_will_do_where_nobody_wants_them(
    tmp_path: Path,
) -> None:
    folder = write_lines(tmp_path / "a", {"target": "0.png", "prompt": "a"}, LINE)
    assert [row.conditioning_image for row in all_rows(opened(folder))] == ["", "source/0.png"]
    source = opened(folder, wants_conditioning=False)
    assert not source.has_conditioning_images
    assert [row.conditioning_image for row in all_rows(source)] == ["", ""]
    assert [row.image for row in all_rows(source)] == ["0.png", "target/0.png"]


@pytest.mark.parametrize("text", ["\n \n", ""])
def test_a_table_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.json: holds no rows"):
        opened(write_lines(tmp_path / "a", text))


@pytest.mark.slow
def test_a_hundred_thousand_lines_take_little_memory(tmp_path: Path) -> None:
    num_rows = 100_000
    folder = write_lines(tmp_path / "a", *([LINE] * num_rows))
    opened(folder)  # so that what modules keep is not counted
    tracemalloc.start()
    source = opened(folder)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == num_rows
    # Eight bytes for where a line begins, four for its number, and an eighth that arrays grow by.
    assert kept < 12 * num_rows * 1.125 + 50_000
    assert peak < 2 * 12 * num_rows * 1.125 + 500_000
    assert next(source.rows([num_rows - 1])).where == f"line {num_rows}"


def test_what_cannot_be_read_is_an_os_error_and_has_no_version(tmp_path: Path, later: None) -> None:
    folder = tmp_path / "fill50k"
    (folder / "inner").mkdir(parents=True)
    (folder / "dangling.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    names = {
        "none.png": "No such file",
        "a\0b": "not a file name",
        "\ud83d.png": "not a file name",
        "inner": "is a directory",
        "dangling.png": "No such file",
        "pipe.png": "is not a regular file",
    }
    write_lines(folder, *(LINE | {"source": name} for name in names))
    source = opened(folder)
    for index, reason in enumerate(names.values()):
        with pytest.raises(OSError, match=reason):
            source.read(index, "conditioning_image")
        assert source.version(index, "conditioning_image") is None


def test_names_may_lead_anywhere(circles: Path, tmp_path: Path) -> None:
    data = (circles / "source" / "0.png").read_bytes()
    (tmp_path / "a.b.png").write_bytes(data)
    names = ["../a.b.png", "./../a.b.png", str(tmp_path / "a.b.png")]
    folder = write_lines(tmp_path / "fill50k", *(LINE | {"source": name} for name in names))
    source = opened(folder)
    assert [source.read(index, "conditioning_image") for index in range(3)] == [data] * 3


def test_what_a_zip_cannot_give_is_an_os_error(circles: Path, tmp_path: Path) -> None:
    names = {
        "source/0.png": "Error -3|CRC",
        "source/none.png": "no such file in the zip",
        "source": "is a directory",
        "a\0b": "no such file in the zip",
        "./source/../source/1.png": None,
    }
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("prompt.json", "\n".join(json.dumps(LINE | {"source": n}) for n in names))
        packed.writestr("source/", b"")
        packed.writestr("source/0.png", bytes(1000))
        packed.writestr("source/1.png", b"whole")
    data = bytearray(path.read_bytes())
    data[data.index(b"source/0.png") + len(b"source/0.png")] ^= 0xFF
    path.write_bytes(data)
    source = opened(path)
    for index, reason in enumerate(names.values()):
        if reason is None:
            assert source.read(index, "conditioning_image") == b"whole"
        else:
            with pytest.raises(OSError, match=reason):
                source.read(index, "conditioning_image")


def test_a_version_changes_with_the_file_and_not_otherwise(
    circles: Path, tmp_path: Path, later: None
) -> None:
    folder = write_lines(tmp_path / "a", LINE, LINE | {"target": "target/1.png"})
    for name in ("source/0.png", "target/0.png", "target/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0123")
    source = opened(folder)

    def versions() -> list[bytes | None]:
        places = [(0, "image"), (1, "image"), (0, "conditioning_image")]
        return [source.version(index, kind) for index, kind in places]

    before = versions()
    assert len(set(before)) == 3
    assert all(one is not None and len(one) == 16 for one in before)
    assert versions() == before
    assert opened(folder).version(0, "image") == before[0]
    kept = (folder / "target/0.png").stat()
    (folder / "target/0.png").write_bytes(b"4567")
    os.utime(folder / "target/0.png", ns=(kept.st_atime_ns, kept.st_mtime_ns))
    after = versions()  # of the same size and time of change: what no user can set tells
    assert after[0] not in (None, before[0])
    assert after[1:] == before[1:]
    (folder / "target/1.png").unlink()
    assert versions() == [after[0], None, before[2]]


def test_a_zips_versions_change_with_the_zip(circles: Path, tmp_path: Path, later: None) -> None:
    path = pack(circles, tmp_path / "fill50k.zip", "")
    source = opened(path)
    before = [source.version(index, "image") for index in range(10)]
    assert len(set(before)) == 10
    assert None not in before
    assert [opened(path).version(index, "image") for index in range(10)] == before
    with path.open("ab") as grown:
        grown.write(b"a")
    assert not set(before) & {source.version(index, "image") for index in range(10)}


def test_a_file_just_written_has_no_version(circles: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    source = opened(write_lines(tmp_path, LINE | {"target": "a.png"}))
    assert source.version(0, "image") is None
    packed = opened(pack(circles, tmp_path / "fill50k.zip", ""))
    assert packed.version(0, "image") is None


def test_what_is_no_data_set_says_so(tmp_path: Path, circles: Path) -> None:
    with pytest.raises(ConfigError, match=r"--source .*nowhere: no such file or folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no data set, neither pictures nor a table of them"):
        opened(tmp_path)
    assert all_rows(opened(circles.parent)) == all_rows(opened(circles))
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ConfigError, match=r"text\.zip is not a whole zip"):
        opened(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as packed:
        packed.writestr("a.txt", "a")
    with pytest.raises(ConfigError, match=r"no prompt\.json in this zip"):
        opened(tmp_path / "other.zip")


def test_one_place_is_named(circles: Path) -> None:
    for settings, found in (
        (SourceSettings(), "none of them"),
        (SourceSettings(source="a", train_data_dir="b"), "--source and --train-data-dir"),
    ):
        with pytest.raises(ConfigError, match="--source, --dataset-name and --train") as caught:
            open_source(settings)
        assert str(caught.value).endswith(f"found {found}.")
    for settings in (
        SourceSettings(dataset_name=str(circles)),
        SourceSettings(train_data_dir=str(circles)),
    ):
        assert len(open_source(settings)) == 10
    with pytest.raises(ConfigError, match=r"--dataset-name csv: .*not a hub id"):
        open_source(SourceSettings(dataset_name="csv"))
