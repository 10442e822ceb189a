"""Tables of images and captions, and a folder of conditioning images with the images' names."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.precompute.sources.files.flat_pictures import (
    caption,
    lines,
    numbers,
    opened,
    write,
    write_control,
    write_image,
    zipped,
)


def write_table(folder: Path, names: list[str]) -> None:
    """Write images, and a table of them with captions alone."""
    for number, name in enumerate(names):
        write_image(folder / name, number)
    rows = [{"file_name": name, "text": caption(n)} for n, name in enumerate(names)]
    write(folder / "metadata.jsonl", lines(rows))


@pytest.mark.parametrize("place", ["mine/edges", "edges", "mine/edges.zip", "edges.zip"])
@pytest.mark.parametrize("inner", ["photos/a", "a", ""])
def test_controls_lie_in_folders_as_the_images_do(tmp_path: Path, place: str, inner: str) -> None:
    names = [f"photos/a/{number}.JPG" for number in range(3)]
    write_table(tmp_path / "mine", names)
    folder = tmp_path / place.removesuffix(".zip")
    for number in range(4):
        write_control(folder / inner / f"{number}.png", number)
    write(folder / inner / "notes.txt", "")
    if place.endswith(".zip"):
        zipped(folder, tmp_path / place)
    given = str(tmp_path / place)
    source = opened(tmp_path / "mine", conditioning_data_dir=given)
    assert numbers(source) == [0, 1, 2]
    assert source.layout == (
        f"table metadata.jsonl, and conditioning images of its images' names in {given}"
    )
    # In a zip, the folder that everything lies in counts for nothing.
    told = inner.partition("/")[2] if place.endswith(".zip") else inner
    unread = str(Path(told) / "3.png")
    line = f"conditioning images that are not read, without an image: 1 ({unread})"
    assert line in source.remarks
    assert not [one for one in source.remarks if "zips" in one]


def test_a_table_in_a_folder_of_its_own(tmp_path: Path) -> None:
    write_table(tmp_path / "mine" / "train", ["0.png", "1.png"])
    write_table(tmp_path / "mine" / "more", ["0.png"])
    for name, number in (("train/0", 0), ("train/1", 1), ("more/0", 0)):
        write_control(tmp_path / "edges" / f"{name}.png", number)
    source = opened(tmp_path / "mine", conditioning_data_dir=str(tmp_path / "edges"), split="train")
    assert numbers(source) == [0, 1]


def test_a_control_too_few_or_too_many_is_one_bad_row(tmp_path: Path) -> None:
    write_table(tmp_path / "mine", ["0.png", "1.png", "2.png"])
    for name, number in (("0.png", 0), ("2.png", 2), ("2.webp", 2)):
        write_control(tmp_path / "edges" / name, number)
    source = opened(tmp_path / "mine", conditioning_data_dir=str(tmp_path / "edges"))
    assert next(source.rows([2])).fault == "two conditioning images: 2.png and 2.webp"
    with pytest.raises(OSError, match="no conditioning image"):
        source.read(1, "conditioning_image")
    assert source.version(1, "conditioning_image") is None
    for name in ("0.png", "2.png", "2.webp"):
        (tmp_path / "edges" / name).rename(tmp_path / "edges" / f"not-{name}")
    with pytest.raises(ConfigError, match="none of its 3 images has a conditioning image of its"):
        opened(tmp_path / "mine", conditioning_data_dir=str(tmp_path / "edges"))


def test_pictures_that_no_row_names_are_counted_all_the_same(tmp_path: Path) -> None:
    write_table(tmp_path / "mine", ["0.png", "1.png"])
    write_image(tmp_path / "mine" / "2.png", 2)
    for folder in ("edges", "mine/edges"):
        for number in range(2):
            write_control(tmp_path / folder / f"{number}.png", number)
    line = "pictures that no row names, or no option asks for: {} of 5"
    for folder, count in (("mine/edges", 1), ("edges", 3)):
        source = opened(tmp_path / "mine", conditioning_data_dir=str(tmp_path / folder))
        assert numbers(source) == [0, 1]
        assert source.remarks == [line.format(count)]
