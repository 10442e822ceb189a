"""What `datasets` reads: image folders, tables, saved data sets."""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from common.errors import ConfigError
from precompute.sources import file_versions
from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings

NUM_ROWS = 3
CAPTIONS = ["a red circle", "a green circle", "a blue circle"]
COLORS = ["red", "green", "blue"]


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(data, "PNG")
    return data.getvalue()


IMAGES = [png(color) for color in COLORS]
OUTLINES = [png(f"#{level:02x}{level:02x}{level:02x}") for level in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images and conditioning images in files."""
    for kind, images in (("target", IMAGES), ("source", OUTLINES)):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for number, data in enumerate(images):
            (tmp_path / "data" / kind / f"{number}.png").write_bytes(data)
    return tmp_path / "data"


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    def call(path: Path, **settings: Any) -> Source:
        cache_dir = tmp_path / "datasets"
        return open_source(
            SourceSettings(train_data_dir=str(path), cache_dir=cache_dir, **settings)
        )

    return call


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a minute pass, so that the times of files just written tell them apart."""
    now = time.time_ns
    monkeypatch.setattr(file_versions.time, "time_ns", lambda: now() + 60 * 10**9)


def lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def metadata(number: int) -> dict[str, Any]:
    return {
        "file_name": f"target/{number}.png",
        "conditioning_image_file_name": f"source/{number}.png",
        "text": CAPTIONS[number],
    }


def embedded(images: list[bytes]) -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": one, "path": f"{at}.png"} for at, one in enumerate(images)], kind)


def names(kind: str) -> list[str]:
    return [f"{kind}/{number}.png" for number in range(NUM_ROWS)]


def write_jsonl_folder(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(lines(*map(metadata, range(NUM_ROWS))))


def write_csv_folder(folder: Path) -> None:
    rows = [",".join(metadata(number).values()) for number in range(NUM_ROWS)]
    (folder / "metadata.csv").write_text("\n".join([",".join(metadata(0)), *rows]))


def write_inner_folders(folder: Path) -> None:
    """A metadata.jsonl for each folder of images; read in the order of their paths."""
    for half, numbers in (("train", [0]), ("train/more", [1, 2])):
        (folder / half).mkdir()
        for number in numbers:
            for kind in ("target", "source"):
                (folder / half / kind).mkdir(exist_ok=True)
                (folder / kind / f"{number}.png").rename(folder / half / kind / f"{number}.png")
        (folder / half / "metadata.jsonl").write_text(lines(*map(metadata, numbers)))


def write_parquet(folder: Path) -> None:
    columns = {"image": embedded(IMAGES), "conditioning_image": embedded(OUTLINES)}
    pq.write_table(pa.table(columns | {"text": pa.array(CAPTIONS)}), folder / "a.parquet")


def write_binary_parquet(folder: Path) -> None:
    columns = {"image": IMAGES, "conditioning_image": OUTLINES, "text": CAPTIONS}
    pq.write_table(pa.table(columns), folder / "a.parquet")


def write_json_names(folder: Path) -> None:
    rows = zip(names("target"), names("source"), CAPTIONS, strict=True)
    keys = "image", "conditioning_image", "text"
    table = lines(*(dict(zip(keys, row, strict=True)) for row in rows))
    (folder / "rows.jsonl").write_text(table)


def write_csv_names(folder: Path) -> None:
    rows = map(",".join, zip(names("target"), names("source"), CAPTIONS, strict=True))
    (folder / "test.csv").write_text("\n".join(["image,conditioning_image,text", *rows]))


def write_split_tables(folder: Path) -> None:
    """A table for each split, which `datasets` tells by their names."""
    write_json_names(folder)
    (folder / "tables").mkdir()
    text = (folder / "rows.jsonl").read_text().replace('": "source/', '": "../source/')
    text = text.replace('": "target/', '": "../target/')
    (folder / "tables" / "train.jsonl").write_text(text)
    (folder / "tables" / "test.jsonl").write_text(text.splitlines()[0])


def write_saved(folder: Path) -> None:
    saved = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": one, "path": None} for one in IMAGES],
            "conditioning_image": [str(folder / name) for name in names("source")],
            "text": CAPTIONS,
        },
        features=datasets.Features(
            image=datasets.Image(),
            conditioning_image=datasets.Image(),
            text=datasets.Value("string"),
        ),
    )
    saved.save_to_disk(folder / "saved")


def write_saved_splits(folder: Path) -> None:
    write_saved(folder)
    saved = datasets.load_from_disk(str(folder / "saved"))
    splits = datasets.DatasetDict({"test": saved.select([0]), "train": saved})
    splits.save_to_disk(folder / "splits")


@pytest.mark.parametrize(
    ("write", "inner"),
    [
        (write_jsonl_folder, ""),
        (write_csv_folder, ""),
        (write_inner_folders, ""),
        (write_parquet, "a.parquet"),
        (write_binary_parquet, "a.parquet"),
        (write_json_names, ""),
        (write_csv_names, ""),
        (write_csv_names, "test.csv"),
        (write_split_tables, "tables"),
        (write_saved, "saved"),
        (write_saved_splits, "splits"),
    ],
)
def test_every_kind_gives_the_same_rows(
    folder: Path,
    opened: Callable[..., Source],
    later: None,
    write: Callable[[Path], None],
    inner: str,
) -> None:
    write(folder)
    source = opened(folder / inner)
    assert source.has_conditioning_images
    assert len(source) == NUM_ROWS
    rows = list(source.rows(range(NUM_ROWS)))
    assert [row.prompt for row in rows] == CAPTIONS
    assert len({row.where for row in rows}) == NUM_ROWS
    for index in range(NUM_ROWS):
        assert source.read(index, "image") == IMAGES[index]
        assert source.read(index, "conditioning_image") == OUTLINES[index]
    kinds = "image", "conditioning_image"
    versions = [source.version(index, kind) for index in range(NUM_ROWS) for kind in kinds]
    assert None not in versions
    assert len(set(versions)) == 2 * NUM_ROWS
    again = opened(folder / inner)
    assert versions == [again.version(index, kind) for index in range(NUM_ROWS) for kind in kinds]


def test_captions_pass_as_they_are(folder: Path, opened: Callable[..., Source]) -> None:
    captions = ["one", ["two", "three"], None, 4]
    rows = [metadata(0) | {"text": caption} for caption in captions]
    (folder / "metadata.jsonl").write_text(lines(*rows))
    assert [row.prompt for row in opened(folder).rows(range(4))] == captions
    lists = [["one", "two"], ["three"], []]
    table = {"image": IMAGES, "conditioning_image": OUTLINES, "several": lists}
    pq.write_table(pa.table(table), folder / "a.parquet")
    source = opened(folder / "a.parquet", caption_column="several")
    assert [row.prompt for row in source.rows(range(3))] == lists


def test_a_bad_image_is_its_rows_affair(
    folder: Path, opened: Callable[..., Source], later: None
) -> None:
    bad = {
        "target/9.png": "No such file",
        "target": "is a directory",
        "a\0b": "not a file name",
        "https://example.org/0.png": "is an address",
        None: "no image",
    }
    (folder.parent / "beside.png").write_bytes(IMAGES[0])
    good = ["../beside.png", str(folder / "target" / "0.png")]
    rows = [metadata(0) | {"file_name": name} for name in [*bad, *good]]
    (folder / "metadata.jsonl").write_text(lines(*rows))
    source = opened(folder)
    for index, reason in enumerate(bad.values()):
        with pytest.raises(OSError, match=reason):
            source.read(index, "image")
        assert source.version(index, "image") is None
    for index in range(len(bad), len(bad) + len(good)):
        assert source.read(index, "image") == IMAGES[0]
        assert source.version(index, "image") is not None
    assert next(source.rows([4])).name == "line 5"


def test_it_is_said_which_image_a_row_lacks(folder: Path, opened: Callable[..., Source]) -> None:
    rows = [metadata(0), metadata(1) | {"conditioning_image_file_name": None}]
    (folder / "metadata.jsonl").write_text(lines(*rows))
    source = opened(folder)
    assert source.read(1, "image") == IMAGES[1]
    with pytest.raises(OSError, match=r"^no conditioning image$"):
        source.read(1, "conditioning_image")


def test_versions_change_with_the_files(
    folder: Path, opened: Callable[..., Source], later: None
) -> None:
    write_jsonl_folder(folder)
    source = opened(folder)
    before = [source.version(index, "image") for index in range(NUM_ROWS)]
    (folder / "target" / "1.png").write_bytes(IMAGES[2])
    after = [source.version(index, "image") for index in range(NUM_ROWS)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_versions_change_with_the_table(
    folder: Path, opened: Callable[..., Source], later: None
) -> None:
    write_saved(folder)
    before = opened(folder / "saved").version(0, "image")
    (arrow,) = (folder / "saved").glob("*.arrow")
    os.utime(arrow, ns=(0, arrow.stat().st_mtime_ns + 1))
    assert opened(folder / "saved").version(0, "image") not in (None, before)


def test_an_image_folder_needs_captions(folder: Path, opened: Callable[..., Source]) -> None:
    for settings in ({}, {"wants_conditioning": False}):
        with pytest.raises(ConfigError, match=r"3 images and no captions; .* in metadata\.jsonl, "):
            opened(folder / "target", **settings)


def test_columns_must_hold_what_is_asked(folder: Path, opened: Callable[..., Source]) -> None:
    table = {"image": [1, 2, 3], "conditioning_image": OUTLINES, "text": CAPTIONS}
    pq.write_table(pa.table(table), folder / "a.parquet")
    with pytest.raises(ConfigError, match="column 'image' holds int64; --image-column needs"):
        opened(folder / "a.parquet")


def test_a_split_that_is_not_train_must_be_the_only_one(
    folder: Path, opened: Callable[..., Source]
) -> None:
    write_saved(folder)
    saved = datasets.load_from_disk(str(folder / "saved"))
    datasets.DatasetDict({"test": saved}).save_to_disk(folder / "one")
    assert len(opened(folder / "one")) == NUM_ROWS
    datasets.DatasetDict({"test": saved, "dev": saved}).save_to_disk(folder / "two")
    with pytest.raises(ConfigError, match="two: no split 'train'; it has test, dev"):
        opened(folder / "two")


def test_what_datasets_cannot_read_is_named(folder: Path, opened: Callable[..., Source]) -> None:
    (folder / "notes").mkdir()
    (folder / "notes" / "a.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigError, match=r"notes: no data set, neither pictures nor a table"):
        opened(folder / "notes")
    (folder / "notes" / "notes.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigError, match="scripts are no longer supported"):
        opened(folder / "notes")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"damaged, a\.parquet: cannot be read as Parquet"):
        opened(folder / "damaged")


def test_one_caption_for_all_needs_no_column(folder: Path, opened: Callable[..., Source]) -> None:
    table = {"image": IMAGES, "conditioning_image": OUTLINES}
    pq.write_table(pa.table(table), folder / "a.parquet")
    source = opened(folder / "a.parquet", caption="a circle")
    assert [row.prompt for row in source.rows(range(NUM_ROWS))] == ["a circle"] * NUM_ROWS
    assert [source.read(index, "image") for index in range(NUM_ROWS)] == IMAGES
    assert source.remarks[0] == "one caption for all rows: 'a circle'"
