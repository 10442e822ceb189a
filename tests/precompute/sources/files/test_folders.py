"""What lies in a folder beside the data set: caches, links, files and tables of other kinds."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import ConfigError
from precompute.sources.files_below import files_below
from tests.precompute.sources.files.flat_pictures import (
    caption,
    captioned,
    numbers,
    opened,
    photographs,
    write,
    write_control,
    write_image,
)


@pytest.mark.parametrize(
    "files",
    [
        ["manifest.json", "latents/000000.tar"],
        ["manifest.previous.json", "text/000000.tar", "README.md"],
        ["plan.safetensors", "conditioning/a/drawn.png"],
        ["hashes.npy", "hashes.npy.lock", "text/000000.tar.tmp-0a"],
    ],
)
def test_a_cache_in_the_folder_is_no_part_of_the_data_set(tmp_path: Path, files: list[str]) -> None:
    captioned(tmp_path / "mine")
    write_image(tmp_path / "cache" / "validation" / "a" / "9.png", 9)
    for file in files:
        write(tmp_path / "cache" / file, b"")
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == ["caches in this folder, not read: 1 (cache)"]
    with pytest.raises(ConfigError, match="cache: is a cache that precompute made"):
        photographs(tmp_path / "cache")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "name",
    ["metadata.csv", "prompt.json", "rows.jsonl", "0.parquet", "0.tar", "images.zip"],
)
def test_what_git_lfs_has_yet_to_fetch_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, POINTER)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ConfigError, match=rf"{name}: pointers of Git LFS, .*: git lfs pull"):
            photographs(source)


def test_a_caption_that_git_lfs_has_yet_to_fetch_makes_a_bad_row(tmp_path: Path) -> None:
    captioned(tmp_path)
    write(tmp_path / "2.txt", POINTER)
    rows = list(photographs(tmp_path).rows(range(4)))
    assert [row.prompt for row in rows] == [caption(0), caption(1), None, caption(3)]
    assert rows[2].fault == "2.txt: it is a pointer of Git LFS: git lfs pull"


def test_captions_beside_pictures_that_a_table_stands_for_are_named(tmp_path: Path) -> None:
    captioned(tmp_path / "b", range(2))
    write_image(tmp_path / "a" / "5.png", 5)
    row = {"file_name": "5.png", "text": caption(5)}
    write(tmp_path / "a" / "metadata.jsonl", json.dumps(row))
    source = photographs(tmp_path)
    assert numbers(source) == [5]
    assert source.remarks == [
        "pictures that no row names, or no option asks for: 2 of 3",
        "caption files beside pictures, not read, since a table has the captions: 2 (b/0.txt, "
        "b/1.txt)",
    ]


@pytest.mark.parametrize(
    "files",
    [["manifest.json", "1.png"], ["hashes.npy", "1.png"], ["latents/000000.png"]],
)
def test_a_folder_with_a_name_or_two_of_a_cache_is_none(tmp_path: Path, files: list[str]) -> None:
    captioned(tmp_path / "mine")
    for file in files:
        write_image(tmp_path / "other" / file, 9)
    assert len(photographs(tmp_path, caption="")) > 4


def test_a_cache_beside_tars_is_not_read(tmp_path: Path) -> None:
    folder = captioned(tmp_path / "mine")
    with tarfile.open(tmp_path / "tars.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
            path.unlink()
    for file in ("manifest.json", "text/000000.tar", "latents/000000.tar"):
        write(tmp_path / "cache" / file, b"")
    source = photographs(tmp_path)
    assert len(source) == 4
    assert source.remarks == ["caches in this folder, not read: 1 (cache)"]


def test_a_link_to_a_folder_beside_it_is_followed_for_all_kinds_of_files(tmp_path: Path) -> None:
    captioned(tmp_path / "a", range(2))
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "a" / "circle").symlink_to("..")
    assert [row.image for row in photographs(tmp_path, caption="").rows(range(4))] == [
        "a/0.png",
        "a/1.png",
        "b/0.png",
        "b/1.png",
    ]
    found, num_others = files_below(tmp_path, [".txt"])
    assert list(map(str, found.values())) == ["a/0.txt", "a/1.txt", "b/0.txt", "b/1.txt"]
    assert num_others == 4


def test_what_img2dataset_writes_as_files(tmp_path: Path) -> None:
    for shard in (0, 1):
        folder = tmp_path / f"{shard:05d}"
        captioned(folder, range(2 * shard, 2 * shard + 2))
        for number in range(2 * shard, 2 * shard + 2):
            write(folder / f"{number}.json", json.dumps({"url": "a", "caption": "b"}))
        table = pa.table({"url": ["a"], "caption": ["b"], "status": ["success"]})
        pq.write_table(table, tmp_path / f"{shard:05d}.parquet")
        write(tmp_path / f"{shard:05d}_stats.json", json.dumps({"count": 2}))
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == [
        "other files, not read: 4 (00000/0.json, 00000/1.json, 00001/2.json, …)",
        "tables that lack columns, or name no pictures here, not read: 4 "
        "(00000.parquet, 00001.parquet, 00000_stats.json, …)",
    ]
    with pytest.raises(ConfigError, match=r"no conditioning images\. Put them"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_pictures_with_captions_beside_a_table_of_images_are_two_data_sets(
    tmp_path: Path, name: str
) -> None:
    captioned(tmp_path)
    pq.write_table(pa.table({"image": [b"a"], "text": ["b"]}), tmp_path / name)
    with pytest.raises(
        ConfigError, match=rf"two data sets, 4 pictures with caption files and {name}"
    ):
        photographs(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "rows.csv", "rows.jsonl"])
@pytest.mark.parametrize(
    "columns",
    [
        {"file_name": "images/0.png", "text": "a"},
        {"file_name": "images/0.png", "conditioning_image_file_name": "conditioning/0.png"},
        {"file_name": "none.png", "conditioning_image_file_name": "none.png", "text": "a"},
        {"image": "0.png", "width": "4"},
    ],
)
def test_pairs_win_over_a_table_without_their_columns_or_names(
    tmp_path: Path, name: str, columns: dict[str, str]
) -> None:
    captioned(tmp_path / "images")
    for number in range(4):
        write_control(tmp_path / "conditioning" / f"{number}.png", number)
    table = "\n".join(map(",".join, (columns.keys(), columns.values())))
    write(tmp_path / name, table if name.endswith("csv") else json.dumps(columns))
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == [
        f"tables that lack columns, or name no pictures here, not read: 1 ({name})"
    ]
    whole = {
        "file_name": "images/2.png",
        "conditioning_image_file_name": "conditioning/2.png",
        "text": caption(2),
    }
    table = "\n".join(map(",".join, (whole.keys(), whole.values())))
    write(tmp_path / name, table if name.endswith("csv") else json.dumps(whole))
    assert numbers(opened(tmp_path)) == [2]
    assert numbers(opened(tmp_path, caption_extension="txt")) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["Metadata.jsonl", "METADATA.CSV", "Prompt.JSON"])
def test_names_of_tables_may_be_in_any_case(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "a" / "0.png", 0)
    row = {"target": "0.png", "prompt": caption(0)} if name == "Prompt.JSON" else None
    row = row or {"file_name": "0.png", "text": caption(0)}
    table = "\n".join(map(",".join, (row.keys(), row.values())))
    write(tmp_path / "a" / name, table if name.endswith("CSV") else json.dumps(row))
    assert numbers(photographs(tmp_path)) == [0]


def test_tables_in_folders_below_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "a" / "0.png", 0)
    row = json.dumps({"file_name": "a/0.png", "text": caption(0)})
    write(tmp_path / "a" / "rows.CSV", "file_name,text\n0.png,a")
    write(tmp_path / "b" / "rows.jsonl", row)
    write(tmp_path / "a" / "0.json", "{}")
    with pytest.raises(ConfigError, match=r"no captions; .*Tables, each of which can be given: 2"):
        photographs(tmp_path)
    write(tmp_path / "metadata.jsonl", row)
    source = photographs(tmp_path)
    assert numbers(source) == [0]
    assert source.remarks == [
        "tables in folders below that are not read: 2 (a/rows.CSV, b/rows.jsonl)"
    ]
