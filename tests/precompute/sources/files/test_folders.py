"""What lies in a folder beside the data set: caches, links, files and tables of other kinds."""

import tarfile
from pathlib import Path

import pytest

from common.errors import ConfigError
from precompute.sources.files_below import files_below
from tests.precompute.sources.files.flat_pictures import (
    captioned,
    numbers,
    photographs,
    write,
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
