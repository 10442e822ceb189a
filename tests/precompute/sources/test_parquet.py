"""Parquet files, read from where they are; splits of theirs and of saved data sets."""

import io
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import ConfigError
from precompute.sources import file_versions
from precompute.sources.open_source import open_source
from precompute.sources.parquet import stored_images
from precompute.sources.source import Kind, Source, SourceSettings
from tests.precompute.sources.webdataset.conftest import (
    assert_rows,
    caption,
    control,
    image,
    samples,
    write_tar,
)

KINDS: tuple[Kind, ...] = ("image", "conditioning_image")


def open_folder(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(train_data_dir=str(path), **settings))


def structs(images: Iterable[bytes | None], names: Iterable[str | None]) -> pa.Array:
    rows = [{"bytes": data, "path": name} for data, name in zip(images, names, strict=True)]
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def write_rows(path: Path, numbers: Iterable[int], as_struct: bool = True, **options: Any) -> None:
    """Write rows with images as `datasets` writes them, or as plain bytes."""
    numbers = list(numbers)
    images, controls = list(map(image, numbers)), list(map(control, numbers))
    columns: dict[str, Any] = {"image": images, "conditioning_image": controls}
    if as_struct:
        names = [f"{number}.png" for number in numbers]
        columns = {name: structs(each, names) for name, each in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns | {"text": list(map(caption, numbers))})
    pq.write_table(table, path, **options)


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize("group_rows", [1, 3, 100])
@pytest.mark.parametrize("batch_bytes", [1, 300, 1 << 25])
def test_rows_in_any_order_and_in_threads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_struct: bool,
    group_rows: int,
    batch_bytes: int,
) -> None:
    monkeypatch.setattr(stored_images, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(stored_images, "NUM_KEPT_BATCHES", 2)
    write_rows(tmp_path / "b.parquet", range(8, 12), as_struct, row_group_size=group_rows)
    write_rows(tmp_path / "a.parquet", range(8), as_struct, row_group_size=group_rows)
    source = open_folder(tmp_path)
    assert source.layout == "Parquet, 2 files"
    assert_rows(source, range(12))
    for index in (11, 0, 7, 6, 5, 8, 1):
        assert source.read(index, "image") == image(index)
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda index: source.read(index % 12, "conditioning_image"), range(99))
        )
    assert found == [control(index % 12) for index in range(99)]


def test_rows_are_those_that_the_datasets_library_gives(tmp_path: Path) -> None:
    for number in range(12):  # in the order of their names: 0, 1, 10, 11, 2, …
        write_rows(tmp_path / "data" / f"{number}.parquet", [2 * number, 2 * number + 1])
    source = open_folder(tmp_path / "data")
    expected = datasets.load_dataset(
        str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache")
    ).with_format("arrow")[:]
    assert [row.prompt for row in source.rows(range(24))] == expected["text"].to_pylist()
    for kind in KINDS:
        found = [source.read(index, kind) for index in range(24)]
        assert found == [one["bytes"] for one in expected[kind].to_pylist()]


def test_nothing_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", range(3))
    assert_rows(open_folder(tmp_path, cache_dir=tmp_path / "datasets"), range(3))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.parquet"]


def test_file_names_and_bytes_in_one_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = file_versions.time.time_ns
    monkeypatch.setattr(file_versions.time, "time_ns", lambda: now() + 60 * 10**9)
    (tmp_path / "tables").mkdir()
    (tmp_path / "1.png").write_bytes(image(1))
    (tmp_path / "2.png").write_bytes(image(2))
    columns = {
        "image": structs([image(0), None, None, None], [None, "1.png", "2.png", None]),
        "conditioning_image": list(map(control, range(4))),
        "text": list(map(caption, range(4))),
    }
    pq.write_table(pa.table(columns), tmp_path / "tables" / "rows.parquet")
    source = open_folder(tmp_path)
    assert_rows(source, [0, 1, 2, None])
    assert [row.image for row in source.rows(range(4))] == ["", "1.png", "2.png", ""]
    with pytest.raises(OSError, match=r"^no image: nothing in column 'image'$"):
        source.read(3, "image")
    versions = [source.version(index, "image") for index in range(4)]
    assert versions[3] is None
    assert len(set(versions)) == 4
    (tmp_path / "2.png").write_bytes(image(1))
    again = [source.version(index, "image") for index in range(4)]
    assert [one == other for one, other in zip(versions, again, strict=True)] == [
        True,
        True,
        False,
        True,
    ]


def test_an_image_folders_table(tmp_path: Path) -> None:
    for folder, numbers in (("a", [0, 1]), ("b", [2])):
        (tmp_path / folder).mkdir()
        for number in numbers:
            (tmp_path / folder / f"{number}.png").write_bytes(image(number))
            (tmp_path / folder / f"c{number}.png").write_bytes(control(number))
        columns = {
            "file_name": [f"{number}.png" for number in numbers],
            "conditioning_image_file_name": [f"c{number}.png" for number in numbers],
            "text": list(map(caption, numbers)),
        }
        pq.write_table(pa.table(columns), tmp_path / folder / "metadata.parquet")
    source = open_folder(tmp_path)
    assert_rows(source, range(3))
    assert source.remarks == []


def test_rows_that_lack_something(tmp_path: Path) -> None:
    columns = {
        "image": [image(0), None, image(2), image(3)],
        "conditioning_image": [control(0), control(1), None, control(3)],
        "text": [caption(0), caption(1), caption(2), None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_folder(tmp_path)
    assert_rows(source, [0, None, None, None])
    for index, kind, words in (
        (1, "image", "image"),
        (2, "conditioning_image", "conditioning image"),
    ):
        with pytest.raises(OSError, match=f"^no {words}: nothing in column '{kind}'$"):
            source.read(index, kind)  # type: ignore[arg-type]
        assert source.version(index, kind) is None  # type: ignore[arg-type]
    (row,) = source.rows([3])
    assert (row.prompt, row.fault) == (None, "no caption: nothing in column 'text'")


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", range(3))
    pq.write_table(pa.table({"image": [image(3)], "text": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"b\.parquet: no column 'conditioning_image'; it has"):
        open_folder(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"b\.parquet: cannot be read as Parquet"):
        open_folder(tmp_path)
    # Columns in another order, and of another type.
    reverse = {
        "text": pa.array([caption(3)], pa.large_string()),
        "conditioning_image": pa.array([control(3)], pa.large_binary()),
        "image": structs([image(3)], [None]),
    }
    pq.write_table(pa.table(reverse), tmp_path / "b.parquet")
    assert_rows(open_folder(tmp_path), range(4))


def test_a_file_without_rows_is_named(tmp_path: Path) -> None:
    """Without rows pandas knows of no types: all columns are null."""
    write_rows(tmp_path / "a.parquet", range(3))
    none = pa.table({"image": pa.nulls(0), "text": pa.nulls(0)})
    pq.write_table(none, tmp_path / "b.parquet")
    source = open_folder(tmp_path)
    assert_rows(source, range(3))
    assert source.layout == "Parquet, 1 file"
    assert source.remarks == ["Parquet files without rows: 1 (b.parquet)"]
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigError, match="holds no rows"):
        open_folder(tmp_path)


def test_a_file_of_rows_that_all_lack_something(tmp_path: Path) -> None:
    """A column in which nothing stands has the type null."""
    write_rows(tmp_path / "a.parquet", range(3))
    columns = {"image": list(map(image, range(2))), "conditioning_image": pa.nulls(2)}
    pq.write_table(pa.table(columns | {"text": pa.nulls(2)}), tmp_path / "b.parquet")
    source = open_folder(tmp_path)
    assert len(source) == 5
    assert source.read(4, "image") == image(1)
    with pytest.raises(OSError, match="no conditioning image: nothing in column 'conditioning_im"):
        source.read(4, "conditioning_image")
    (row,) = source.rows([4])
    assert row.fault == "no caption: nothing in column 'text'"


def test_a_file_is_no_zip_for_one_that_it_holds(tmp_path: Path) -> None:
    packed = io.BytesIO()
    np.savez(packed, depth=np.zeros(4))
    columns = {"image": [image(0)], "conditioning_image": [control(0)], "text": [caption(0)]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns | {"depth": [packed.getvalue()]}), path)
    assert zipfile.is_zipfile(path)
    assert_rows(open_folder(path), range(1))


def test_what_lies_beside_is_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", range(3))
    (tmp_path / "sizes.json").write_text('{"a.parquet": 3}')
    source = open_folder(tmp_path)
    assert_rows(source, range(3))
    assert source.remarks == ["not read: 1 other files beside the Parquet files"]


def test_a_file_that_names_no_split_is_never_left_out(tmp_path: Path) -> None:
    for number in range(6):
        write_rows(tmp_path / f"part-{number}.parquet", [number])
    write_rows(tmp_path / "test-drive.parquet", [6])
    source = open_folder(tmp_path)
    assert_rows(source, range(7))
    assert source.remarks == []
    assert [row.where for row in source.rows([1, 6])] == [
        "part-1.parquet, row 0",
        "test-drive.parquet, row 0",
    ]
    write_rows(tmp_path / "data-test-00000-of-00002.parquet", range(7, 10))
    write_rows(tmp_path / "data-test-00001-of-00002.parquet", [10])
    source = open_folder(tmp_path)
    assert_rows(source, range(7))
    names = "data-test-00000-of-00002.parquet, data-test-00001-of-00002.parquet"
    assert source.remarks == [f"left out: 4 rows of split 'test' ({names})"]
    assert_rows(open_folder(tmp_path, split="test"), range(7, 11))


def test_without_a_split_to_train_on_one_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "validation" / "0.parquet", range(3))
    write_rows(tmp_path / "test" / "0.parquet", range(3, 5))
    with pytest.raises(
        ConfigError, match=r"no split 'train'; it has test, validation\. Choose one: --split test"
    ):
        open_folder(tmp_path)
    assert_rows(open_folder(tmp_path, split="validation"), range(3))


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    def saved(numbers: Iterable[int]) -> datasets.Dataset:
        numbers = list(numbers)
        columns = {"image": list(map(image, numbers)), "text": list(map(caption, numbers))}
        return datasets.Dataset.from_dict(
            columns | {"conditioning_image": list(map(control, numbers))}
        )

    splits = datasets.DatasetDict({"test": saved(range(2)), "extra": saved(range(2, 5))})
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(ConfigError, match=r"no split 'train'; it has test, extra\. Choose one"):
        open_folder(tmp_path / "two")
    source = open_folder(tmp_path / "two", split="extra")
    assert_rows(source, range(2, 5))
    assert source.remarks == ["left out: 2 rows of split 'test'"]
    with pytest.raises(ConfigError, match="no split 'more'"):
        open_folder(tmp_path / "two", split="more")


def test_what_the_datasets_library_copies_is_counted(tmp_path: Path) -> None:
    """A clone from the hub, whose card has several configurations."""
    write_rows(tmp_path / "data" / "big" / "a.parquet", range(5))
    write_rows(tmp_path / "data" / "small" / "a.parquet", range(2))
    card = ["---", "configs:"]
    for name in ("big", "small"):
        card += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    (tmp_path / "data" / "README.md").write_text("\n".join([*card, "---", "# A data set"]))
    source = open_folder(
        tmp_path / "data", dataset_config_name="small", cache_dir=tmp_path / "copies"
    )
    assert_rows(source, range(2))
    (copy,) = (tmp_path / "copies").rglob("*.arrow")
    assert source.remarks == [
        f"copied by the datasets library: {copy.stat().st_size / 1e6:.1f} MB of Arrow files in "
        f"{copy.parent}"
    ]


def test_parquet_beside_tars(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", range(3))
    write_tar(tmp_path / "a.tar", samples(range(3)))
    with pytest.raises(ConfigError, match=r"a\.tar.* a\.parquet\. Give the path of one"):
        open_folder(tmp_path)
