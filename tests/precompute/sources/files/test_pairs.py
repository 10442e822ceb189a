"""Pictures that no table lists: caption files, folders of conditioning images, one caption."""

import os
import unicodedata
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.precompute.sources.files.flat_pictures import (
    caption,
    captioned,
    numbers,
    opened,
    photographs,
    write,
    write_control,
    write_image,
    zipped,
)


def in_two_folders(folder: Path, images: str = "images", controls: str = "conditioning") -> Path:
    captioned(folder / images)
    for number in range(4):
        write_control(folder / controls / f"{number}.png", number)
    return folder


def test_a_caption_file_beside_each_image(tmp_path: Path) -> None:
    source = photographs(captioned(tmp_path))
    assert numbers(source) == [0, 1, 2, 3]
    assert not source.has_conditioning_images
    assert source.layout == "images and caption files of their names (.txt or .caption)"
    assert source.remarks == []
    assert [row.where for row in source.rows([2])] == ["row 2"]
    assert [row.image for row in source.rows([2, 0])] == ["2.png", "0.png"]


def test_endings_of_caption_files(tmp_path: Path) -> None:
    captioned(tmp_path, range(2), ".CAPTION")
    captioned(tmp_path, range(2, 4), ".Tags.TXT")
    with pytest.raises(AssertionError):
        numbers(photographs(tmp_path))
    for own in (".tags.txt", "tags.txt", "TAGS.TXT"):
        source = photographs(tmp_path, caption_extension=own)
        rows = list(source.rows(range(4)))
        assert [row.prompt for row in rows] == [None, None, caption(2), caption(3)]
        assert source.remarks == ["other files, not read: 2 (0.CAPTION, 1.CAPTION)"]
    with pytest.raises(ConfigError, match=r"4 images and no captions; no \.json file has the name"):
        photographs(tmp_path, caption_extension="json")


def test_of_two_caption_files_the_first_ending_is_read_and_the_other_is_named(
    tmp_path: Path,
) -> None:
    captioned(tmp_path)
    write(tmp_path / "2.caption", "older")
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == ["second caption files of an image, not read: 1 (2.caption)"]


def test_captions_are_text_as_typed(tmp_path: Path) -> None:
    texts = {
        "null": b"null\r\n",
        "two\nlines": b"two\nlines\n",
        "": b"",
        "é ☃": "é ☃".encode("utf-8-sig"),
        "é": "é".encode("utf-16"),
    }
    for number, data in enumerate(texts.values()):
        write_image(tmp_path / f"{number}.png", number)
        write(tmp_path / f"{number}.txt", data)
    source = photographs(tmp_path)
    assert [row.prompt for row in source.rows(range(len(texts)))] == list(texts)


def test_an_image_without_a_caption_is_one_bad_row(tmp_path: Path) -> None:
    captioned(tmp_path)
    write_image(tmp_path / "4.png", 4)
    write_image(tmp_path / "5.png", 5)
    write(tmp_path / "5.txt", b"\xff\xfe\x00")
    rows = list(photographs(tmp_path).rows(range(6)))
    assert [(row.prompt, row.fault) for row in rows[:4]] == [(caption(n), "") for n in range(4)]
    assert (rows[4].prompt, rows[4].fault) == (None, "")
    assert (rows[5].prompt, rows[5].fault) == (None, "5.txt: not UTF-8")


@pytest.mark.parametrize(
    ("images", "controls"),
    [
        ("images", "conditioning"),
        ("images", "conditioning_images"),
        ("", "conditioning"),
        ("Images", "Conditioning"),
        ("target", "source"),
        ("a/images/b", "a/conditioning/b"),
        ("a/b", "conditioning/a/b"),
    ],
)
def test_folders_of_equal_stems(tmp_path: Path, images: str, controls: str) -> None:
    source = opened(in_two_folders(tmp_path, images, controls))
    assert numbers(source) == [0, 1, 2, 3]
    assert f"conditioning images of their names in {controls}/" in source.layout
    assert source.remarks == []
    drawn = photographs(tmp_path)
    assert numbers(drawn) == [0, 1, 2, 3]
    assert drawn.remarks == [
        "conditioning images that are not read, since they are drawn: 4 "
        f"({controls}/0.png, {controls}/1.png, {controls}/2.png, …)"
    ]


@pytest.mark.parametrize("place", ["beside", "inside", "zip"])
def test_a_folder_of_conditioning_images_that_the_user_names(tmp_path: Path, place: str) -> None:
    folder = captioned(tmp_path / "mine")
    captioned(tmp_path / "mine" / "more", range(4, 6))
    controls = tmp_path / "mine" / "canny" if place == "inside" else tmp_path / "canny"
    for number in range(6):
        name = f"{number}.png" if number < 4 else f"more/{number}.png"
        write_control(controls / name, number)
    given = zipped(controls, tmp_path / "canny.zip") if place == "zip" else controls
    source = opened(folder, conditioning_data_dir=str(given))
    assert numbers(source) == [0, 1, 2, 3, 4, 5]
    assert source.layout.endswith(f"conditioning images of their names in {given}")
    assert source.remarks == []


def test_images_in_a_folder_have_controls_in_a_flat_one(tmp_path: Path) -> None:
    captioned(tmp_path / "mine" / "pictures")
    for number in range(4):
        write_control(tmp_path / "edges" / f"{number}.jpg", number)
    source = opened(tmp_path / "mine", conditioning_data_dir=str(tmp_path / "edges"))
    assert numbers(source) == [0, 1, 2, 3]


def test_a_control_too_few_or_too_many_is_one_bad_row(tmp_path: Path) -> None:
    in_two_folders(tmp_path)
    (tmp_path / "conditioning" / "1.png").unlink()
    write_control(tmp_path / "conditioning" / "2.webp", 2)
    write_control(tmp_path / "conditioning" / "9.png", 9)
    source = opened(tmp_path)
    rows = list(source.rows(range(4)))
    assert [row.fault for row in rows] == ["", "", "two conditioning images: 2.png and 2.webp", ""]
    with pytest.raises(OSError, match=r"^no conditioning image$"):
        source.read(1, "conditioning_image")
    assert source.version(1, "conditioning_image") is None
    assert source.remarks == [
        "conditioning images that are not read, without an image: 1 (conditioning/9.png)"
    ]


def test_two_images_of_one_name_are_one_bad_row(tmp_path: Path) -> None:
    captioned(tmp_path)
    write_control(tmp_path / "1.jpg", 1)
    source = photographs(tmp_path)
    rows = list(source.rows(range(len(source))))
    assert [row.prompt for row in rows] == list(map(caption, range(4)))
    assert [row.fault for row in rows] == [
        "",
        "two images of one name: 1.jpg and 1.png. Conditioning images belong into a folder of "
        "their own, such as conditioning/",
        "",
        "",
    ]
    assert source.remarks == []
    with pytest.raises(ConfigError, match=r"no conditioning images\. Put them into a folder of"):
        opened(tmp_path)


def test_a_caption_file_may_have_its_images_whole_name(tmp_path: Path) -> None:
    captioned(tmp_path, range(2))
    captioned(tmp_path, range(2, 4), ".png.txt")
    for name in ("1.png.jpg", "4.webp.txt", "5.png.jpg"):
        write(tmp_path / name, "a")
    write(tmp_path / "5.png.txt", "of its stem")
    write(tmp_path / "1.png.jpg.txt", "of another")
    write(tmp_path / "0.png.txt", "second")
    source = photographs(tmp_path)
    rows = list(source.rows(range(6)))
    assert [(row.image, row.prompt) for row in rows] == [
        ("0.png", caption(0)),
        ("1.png", caption(1)),
        ("1.png.jpg", "of another"),
        ("2.png", caption(2)),
        ("3.png", caption(3)),
        ("5.png.jpg", "of its stem"),
    ]
    assert source.remarks == [
        "caption files that are not read, without an image: 1 (4.webp.txt)",
        "second caption files of an image, not read: 1 (0.png.txt)",
    ]


@pytest.mark.parametrize("place", ["named", "given", "drawn"])
def test_other_files_beside_conditioning_images_are_counted(tmp_path: Path, place: str) -> None:
    folder = in_two_folders(tmp_path / "mine")
    controls = folder / "conditioning"
    for name in ("0.txt", "readme.md"):
        write(controls / name, "a")
    settings: dict[str, str] = {}
    if place == "given":
        controls = controls.rename(tmp_path / "edges")
        settings["conditioning_data_dir"] = str(controls)
    source = photographs(folder) if place == "drawn" else opened(folder, **settings)
    assert numbers(source) == [0, 1, 2, 3]
    names = "0.txt, readme.md" if place == "given" else "conditioning/0.txt, conditioning/readme.md"
    assert source.remarks[-1] == f"other files, not read: 2 ({names})"


def test_no_conditioning_images_at_all(tmp_path: Path) -> None:
    captioned(tmp_path / "images")
    with pytest.raises(ConfigError, match=r"no conditioning images\. .*--conditioning-data-dir"):
        opened(tmp_path)
    write_control(tmp_path / "edges" / "9.png", 9)
    with pytest.raises(ConfigError, match="none of its 4 images has a conditioning image of its"):
        opened(tmp_path / "images", conditioning_data_dir=str(tmp_path / "edges"))
    with pytest.raises(ConfigError, match=r"--conditioning-data-dir .*nowhere: no such file"):
        opened(tmp_path / "images", conditioning_data_dir=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--conditioning-data-dir .*empty: holds no pictures"):
        opened(tmp_path / "images", conditioning_data_dir=str(tmp_path / "empty"))
    for name in ("conditioning", "conditioning_images"):
        write_control(tmp_path / name / "0.png", 0)
    with pytest.raises(ConfigError, match="two folders of conditioning images, conditioning and "):
        opened(tmp_path)


def test_one_caption_for_all(tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / "a" / f"number {number}.png", number)
    with pytest.raises(ConfigError, match=r"2 images and no captions; .*give one for all: --capt"):
        photographs(tmp_path)
    for one, expected in {
        "": ["", ""],
        "a {photo}": ["a {photo}"] * 2,
        "{name}": [caption(0), caption(1)],
        "my {name}": [f"my {caption(0)}", f"my {caption(1)}"],
    }.items():
        source = photographs(tmp_path, caption=one)
        assert [row.prompt for row in source.rows([0, 1])] == expected
        assert repr(one) in source.remarks[0]
    write(tmp_path / "a" / "number 1.txt", "older")
    assert (
        "caption files that are not read, beside --caption: 1 (a/number 1.txt)"
        in photographs(tmp_path, caption="").remarks
    )


def test_odd_files_are_passed_over_or_named(tmp_path: Path) -> None:
    captioned(tmp_path)
    write_image(tmp_path / "4.JPG", 4)
    write(tmp_path / "4.TXT", caption(4))
    for junk in (".DS_Store", "._0.png", "Thumbs.db", "__MACOSX/0.png", ".cache/9.png"):
        write(tmp_path / junk, b"junk")
    for other in ("notes.pdf", "lone.txt", "docs/readme.md", "sizes.json"):
        write(tmp_path / other, "{}")
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3, 4]
    assert source.remarks == [
        "caption files that are not read, without an image: 1 (lone.txt)",
        "other files, not read: 2 (docs/readme.md, notes.pdf)",
        "tables that lack columns, or name no pictures here, not read: 1 (sizes.json)",
    ]


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    captioned(tmp_path / "elsewhere", range(2))
    captioned(tmp_path / "mine", range(2, 4))
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "5.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    write(tmp_path / "mine" / "5.txt", caption(0))
    assert numbers(photographs(tmp_path / "mine")) == [2, 3, 0, 0, 1]


def test_letters_with_accents_in_two_forms_are_one_name(tmp_path: Path) -> None:
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    write_image(tmp_path / "images" / f"{one}.png", 0)
    write(tmp_path / "images" / f"{two}.txt", caption(0))
    write_control(tmp_path / "conditioning" / f"{two}.png", 0)
    assert numbers(opened(tmp_path)) == [0]


def test_a_name_that_is_no_utf8_is_read(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "3.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    (tmp_path / "3.txt").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    (row,) = source.rows([3])
    assert row.name == r"row 3, \udcff.png"


def test_folders_called_like_splits(tmp_path: Path) -> None:
    captioned(tmp_path / "validation", range(3))
    captioned(tmp_path / "test", range(3, 5))
    with pytest.raises(ConfigError, match=r"no split 'train'; it has .*--split"):
        photographs(tmp_path)
    source = photographs(tmp_path, split="test")
    assert numbers(source) == [3, 4]
    assert source.remarks == ["left out: 3 rows of split 'validation'"]
    captioned(tmp_path / "train", range(5, 6))
    captioned(tmp_path / "more", range(6, 7))
    source = photographs(tmp_path)
    assert numbers(source) == [6, 5]
    assert sorted(source.remarks) == [
        "left out: 2 rows of split 'test'",
        "left out: 3 rows of split 'validation'",
    ]
    with pytest.raises(ConfigError, match="no split 'dev'; none of its"):
        photographs(tmp_path / "train", split="dev")


@pytest.mark.parametrize("prefix", ["", "my pictures/", "my\\"])
def test_a_zip_is_read_as_its_folder(tmp_path: Path, prefix: str) -> None:
    in_two_folders(tmp_path / "mine")
    write(tmp_path / "mine" / "__MACOSX" / "images" / "._0.png", b"junk")
    archive = zipped(tmp_path / "mine", tmp_path / "mine.zip", prefix)
    source = opened(archive)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == (
        "images, caption files of their names (.txt or .caption) and conditioning images of their "
        "names in conditioning/, in a zip"
    )
    assert source.remarks == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.zip"]


def test_several_zips_are_folders_of_their_names(tmp_path: Path) -> None:
    in_two_folders(tmp_path / "a")
    zipped(tmp_path / "a" / "images", tmp_path / "images.zip")
    zipped(tmp_path / "a" / "conditioning", tmp_path / "conditioning.zip", "conditioning/")
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout.endswith("in conditioning/, in 2 zips")


def test_a_zip_beside_pictures_is_named(tmp_path: Path) -> None:
    captioned(tmp_path)
    zipped(captioned(tmp_path / "old", range(4, 5)), tmp_path / "old.zip")
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == ["zips that are not read: 1 (old.zip)"]


@pytest.mark.parametrize("name", ["notes.gz", "photos.tar.gz", "old/photos.TGZ"])
def test_what_is_compressed_is_one_more_file_beside_pictures(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "0.png", 0)
    write(tmp_path / "0.txt", caption(0))
    write(tmp_path / name, b"\x1f\x8b")
    source = photographs(tmp_path)
    assert numbers(source) == [0]
    assert source.remarks == [f"other files, not read: 1 ({name})"]
