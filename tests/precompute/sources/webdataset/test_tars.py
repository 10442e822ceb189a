"""WebDataset tars as a data set: rows, columns, splits and all that may be odd in them."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from common.errors import ConfigError, RunError
from precompute.sources.webdataset import tars
from tests.precompute.sources.webdataset.conftest import (
    assert_rows,
    caption,
    control,
    image,
    open_tars,
    sample,
    samples,
    write_tar,
)

UNNAMED: dict[str, Any] = {"image_column": "image", "caption_column": "text"}


def renamed(
    number: int, endings: dict[str, str], key: str | None = None
) -> list[tuple[str, bytes]]:
    """Return a sample with other endings; one that is empty is left out."""
    members = []
    for name, data in sample(number, key):
        stem, _, ending = name.rpartition(".")
        if endings.get(ending, ending):
            members.append((f"{stem}.{endings.get(ending, ending)}", data))
    return members


def test_samples_of_several_tars_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "b.tar", samples(range(3, 5)))
    write_tar(tmp_path / "a.tar", samples(range(3)))
    write_tar(tmp_path / "c" / "a.TAR", samples([5]))
    source = open_tars(tmp_path)
    assert_rows(source, range(6))
    row = next(source.rows([4]))
    assert (row.image, row.conditioning_image) == ("b.tar/0004.jpg", "b.tar/0004.png")
    assert row.name == "row 4, b.tar/0004.jpg"
    assert (source.layout, source.remarks) == ("WebDataset, 3 tars", [])
    assert source.has_conditioning_images
    assert_rows(open_tars(tmp_path / "b.tar"), [3, 4])


def test_rows_are_those_that_the_datasets_library_gives(tmp_path: Path) -> None:
    for number in range(12):  # in the order of their names: 0, 1, 10, 11, 2, …
        write_tar(tmp_path / "tars" / f"{number}.tar", samples([2 * number, 2 * number + 1]))
    source = open_tars(tmp_path / "tars")
    expected = datasets.load_dataset(
        str(tmp_path / "tars"), split="train", cache_dir=str(tmp_path / "cache")
    ).with_format("arrow")[:]
    assert len(source) == 24
    assert [row.prompt for row in source.rows(range(24))] == expected["txt"].to_pylist()
    for kind, column in (("image", "jpg"), ("conditioning_image", "png")):
        found = [source.read(index, kind) for index in range(24)]  # type: ignore[arg-type]
        assert found == [one["bytes"] for one in expected[column].to_pylist()]


def test_conditioning_images_are_not_needed_where_they_are_drawn(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [one for one in samples(range(2)) if one[0][-3:] != "png"])
    with pytest.raises(
        ConfigError, match=r"no conditioning image in it: no member ends in \.png; they end in "
    ):
        open_tars(tmp_path)
    source = open_tars(tmp_path, wants_conditioning=False)
    assert not source.has_conditioning_images
    assert next(source.rows([1])).conditioning_image == ""


def test_columns_need_no_names_where_they_have_the_usual(tmp_path: Path) -> None:
    for number, ending in enumerate(["jpg", "jpeg", "png", "webp"]):
        endings = {"jpg": ending, "png": "conditioning_image.png", "txt": "caption"}
        write_tar(tmp_path / f"{number}.tar", renamed(number, endings))
    columns = UNNAMED | {"conditioning_image_column": "conditioning_image"}
    assert_rows(open_tars(tmp_path, **columns), range(4))
    # What the user has named for the one is not taken for the other.
    write_tar(tmp_path / "b" / "0.tar", samples(range(3)))
    assert_rows(open_tars(tmp_path / "b", **UNNAMED), range(3))
    with pytest.raises(
        ConfigError, match=r"0000\.jpg and 0000\.png; which is the image\?.*--image-column"
    ):
        open_tars(tmp_path / "b", **columns)
    with pytest.raises(ConfigError, match=r"Did you mean --conditioning-image-column png\?"):
        open_tars(tmp_path / "b", **(columns | {"image_column": "jpg"}))


def test_of_several_endings_the_first_that_is_there_is_taken(tmp_path: Path) -> None:
    members = []
    for number, ending in enumerate(["jpg", "jpeg", "png", "webp"]):
        members += renamed(number, {"jpg": ending, "png": "depth.png"})
    members += [*renamed(4, {"png": "depth.png"}), ("0004.webp", b"another")]
    members += [("0005.webp", b"another"), *renamed(5, {"png": "depth.png"})]
    write_tar(tmp_path / "a.tar", members)
    columns = {"image_column": "jpg;png;jpeg;webp", "conditioning_image_column": "depth.png"}
    assert_rows(open_tars(tmp_path, **columns), range(6))


def test_a_conditioning_image_never_stands_in_for_the_image(tmp_path: Path) -> None:
    members = [*samples(range(2)), *renamed(2, {"jpg": ""}), *samples([3])]
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path, image_column="jpg;png")
    assert_rows(source, [0, 1, None, 3])
    (row,) = source.rows([2])
    assert row.fault == "no image: a.tar/0002.png is the conditioning image already"
    # Unless that is what the user says.
    source = open_tars(tmp_path, image_column="png")
    assert source.read(2, "image") == source.read(2, "conditioning_image") == control(2)


@pytest.mark.parametrize("odd", [3, 7])
def test_case_does_not_matter(tmp_path: Path, odd: int) -> None:
    members = []
    for number in range(8):
        members += renamed(number, {"jpg": "JPG", "txt": "Txt"} if number == odd else {})
    write_tar(tmp_path / "a.tar", members)
    assert_rows(open_tars(tmp_path, conditioning_image_column="PNG"), range(8))


@pytest.mark.parametrize("odd", [0, 3, 7])
@pytest.mark.parametrize("lacking", ["jpg", "png", "txt"])
def test_a_sample_that_lacks_a_member_is_one_bad_row(
    tmp_path: Path, odd: int, lacking: str
) -> None:
    members = []
    for number in range(8):
        members += renamed(number, {lacking: ""} if number == odd else {})
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path)
    assert_rows(source, [None if number == odd else number for number in range(8)])
    row = next(source.rows([odd]))
    if lacking == "txt":
        assert row.fault == f"no caption: a.tar has no member {odd:04d}.txt"
        assert row.prompt is None
    else:
        kind = "image" if lacking == "jpg" else "conditioning_image"
        words = kind.replace("_", " ")
        with pytest.raises(
            OSError, match=rf"^no {words}: a\.tar has no member {odd:04d}\.{lacking}$"
        ):
            source.read(odd, kind)  # type: ignore[arg-type]
        assert getattr(row, kind) == ""
        assert source.version(odd, kind) is None  # type: ignore[arg-type]


def test_a_dot_in_a_samples_name_ends_its_key(tmp_path: Path) -> None:
    members = samples(range(120))
    for number in range(120, 160):
        members += sample(number, key=f"a.{number}")
    write_tar(tmp_path / "x.tar", members)
    source = open_tars(tmp_path)
    assert_rows(source, [*range(120), *[None] * 40])
    for index, row in enumerate(source.rows(range(120, 160)), start=120):
        assert row.fault.startswith(f"x.tar/a.{index}.jpg: a sample's key ends at the first dot")
    (remark,) = source.remarks
    assert remark.startswith("not read: 120 members, ")
    assert remark.endswith(
        "a sample's key ends at the first dot of the name, by WebDataset's rule: x.tar/a.120.jpg"
    )
    write_tar(tmp_path / "x.tar", members[360:])
    with pytest.raises(ConfigError, match=r"no sample of 40 can be used\. x\.tar/a\.120\.jpg: a "):
        open_tars(tmp_path)


def test_other_members_are_counted(tmp_path: Path) -> None:
    members = []
    for number in range(4):
        members += [*sample(number), (f"{number:04d}.cls", b"1"), (f"{number:04d}.canny.png", b"")]
    members += [("README", b"what this is"), ("._0001.jpg", b"of a Mac"), ("__meta__", b"{}")]
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path)
    assert_rows(source, range(4))
    assert source.remarks == [
        "not read: 8 members, .cls (4), .canny.png (4); a sample's key ends at the first dot of "
        "the name, by WebDataset's rule: a.tar/0000.canny.png",
        "not read: 1 links and names without ending: a.tar/README",
    ]


def test_members_that_are_not_side_by_side(tmp_path: Path) -> None:
    members = sorted(samples(range(5)), key=lambda one: one[0][-3:])
    write_tar(tmp_path / "a.tar", members)
    message = (
        r"no sample of 5 can be used\. the members of 0000 are not side by side in a\.tar: sort"
    )
    with pytest.raises(ConfigError, match=message):
        open_tars(tmp_path)
    # One member of one sample at the end of the tar.
    members = samples(range(5))
    members.append(members.pop(4))
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path)
    assert_rows(source, [0, None, 2, 3, 4])
    assert next(source.rows([1])).fault == (
        "the members of 0001 are not side by side in a.tar: sort the tar by name"
    )


def test_members_that_are_there_twice(tmp_path: Path) -> None:
    members = [*samples(range(2)), ("0001.jpg", image(7)), *samples([2]), ("0002.JPG", image(7))]
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path)
    assert_rows(source, [0, None, None])
    assert [row.fault for row in source.rows([1, 2])] == [
        "a.tar holds 0001.jpg twice",
        "a.tar holds both 0002.jpg and 0002.JPG",
    ]
    # Whole samples with one key are rows, as webdataset has it.
    write_tar(tmp_path / "a.tar", [*samples(range(3)), *sample(3, "0001")])
    source = open_tars(tmp_path)
    assert_rows(source, [0, 1, 2, 3])
    assert source.remarks[0].startswith("1 samples have the key of an earlier one in their tar")


def test_equal_keys_in_different_tars_are_different_samples(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", sample(number, "same"))
    source = open_tars(tmp_path)
    assert_rows(source, range(3))
    assert source.remarks == []


def test_damaged_tars_are_refused_by_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(3)))
    cut = write_tar(tmp_path / "1.tar", samples(range(3, 8)))
    write_tar(tmp_path / "2.tar", samples(range(8, 11)))
    data = cut.read_bytes()
    header = data.index(b"0006.jpg\0")
    cut.write_bytes(data[: header + 100])
    with pytest.raises(
        ConfigError, match=r"1\.tar is cut|1\.tar is damaged: no tar header at byte"
    ):
        open_tars(tmp_path)
    cut.write_bytes(data[: header + 512 + 10])
    with pytest.raises(ConfigError, match=r"1\.tar is cut: .*0006\.jpg'.* ends at \d+"):
        open_tars(tmp_path)
    (tmp_path / "3.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"\(2 of 4 tars are so\) Nothing was read"):
        open_tars(tmp_path)


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples(range(3)))
    path = write_tar(tmp_path / "1.tar.gz", samples(range(3)))
    import gzip

    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"1\.tar\.gz is compressed with gzip; unpack it"):
        open_tars(tmp_path)


def in_json(number: int, value: object, **more: object) -> list[tuple[str, bytes]]:
    document = json.dumps({"caption": value, "meta": {"alt": value}, "width": 16, **more})
    return [*sample(number)[:2], (f"{number:04d}.json", document.encode())]


def test_captions_in_json(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [one for at in range(3) for one in in_json(at, caption(at))])
    for column in ("json.caption", "json.meta.alt", "text", "txt;json.caption", "JSON.caption"):
        assert_rows(open_tars(tmp_path, caption_column=column), range(3))
    with pytest.raises(ConfigError, match=r"0000\.json has no field 'title'\. --caption-column"):
        open_tars(tmp_path, caption_column="json.title")
    with pytest.raises(ConfigError, match=r"holds an object: name a field, e\.g\. json\.caption"):
        open_tars(tmp_path, caption_column="json")
    members = [*sample(0)[:2], ("0000.json", json.dumps(caption(0)).encode())]
    write_tar(tmp_path / "a.tar", members)
    assert_rows(open_tars(tmp_path, caption_column="json"), [0])


def test_an_odd_caption_is_one_bad_row(tmp_path: Path) -> None:
    odd = {
        1: (b"{", "is not JSON"),
        2: (b'{"caption": null}', "has no field 'caption'"),
        3: (b"[]", "has no field 'caption'"),
        4: (b"\xff", "is no UTF-8 text"),
    }
    members = in_json(0, caption(0))
    for number, (data, _) in odd.items():
        members += [*sample(number)[:2], (f"{number:04d}.json", data)]
    members += in_json(5, ["one", "two"]) + in_json(6, 7)
    write_tar(tmp_path / "a.tar", members)
    source = open_tars(tmp_path, caption_column="json.caption")
    assert_rows(source, [0, *[None] * 6])
    for number, (_, reason) in odd.items():
        fault = next(source.rows([number])).fault
        assert fault.startswith(f"no caption: a.tar/{number:04d}.json {reason}")
    assert [row.prompt for row in source.rows([5, 6])] == [["one", "two"], 7]


def test_captions_pass_as_they_are(tmp_path: Path) -> None:
    texts = ["", "line\nbreak\n", "ünï 🎈", "\ufeffmarked", 'half "quotes\\']
    members = []
    for number, text in enumerate(texts):
        members += [*sample(number)[:2], (f"{number:04d}.txt", text.encode())]
    write_tar(tmp_path / "a.tar", members)
    found = [row.prompt for row in open_tars(tmp_path).rows(range(len(texts)))]
    assert found == [text.removeprefix("\ufeff") for text in texts]


def test_img2datasets_output(tmp_path: Path) -> None:
    for tar in range(2):
        numbers = range(4 * tar, 4 * tar + 4)
        members = [
            one
            for at in numbers
            for one in [*sample(at), (f"{at:04d}.json", b'{"caption": "another", "url": ""}')]
        ]
        write_tar(tmp_path / f"{tar:05d}.tar", members)
        table = {"url": ["u"] * 4, "caption": ["c"] * 4, "key": [f"{at:04d}" for at in numbers]}
        pq.write_table(pa.table(table), tmp_path / f"{tar:05d}.parquet")
        (tmp_path / f"{tar:05d}_stats.json").write_text('{"count": 4, "successes": 4}')
    for columns in ({}, UNNAMED):
        source = open_tars(tmp_path, **columns)
        assert_rows(source, range(8))
        assert (
            "not read: 4 tables beside the tars: 00000.parquet, 00000_stats.json, 00001.parquet, …"
            in (source.remarks)
        )


def test_a_list_of_sizes_beside_a_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(range(5)))
    (tmp_path / "sizes.json").write_text('{"a.tar": 5}')
    (tmp_path / "README.md").write_text("# tars")
    source = open_tars(tmp_path)
    assert_rows(source, range(5))
    assert source.remarks == [
        "not read: 1 tables beside the tars: sizes.json",
        "not read: 1 other files beside the tars",
    ]


@pytest.mark.parametrize("name", ["metadata.jsonl", "rows.csv", "a.parquet"])
def test_tars_beside_a_table_that_may_be_meant(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", samples(range(5)))
    if name.endswith("csv"):
        (tmp_path / name).write_text("\ufeffimage,text\n0.png,one\n")
    elif name.endswith("jsonl"):
        (tmp_path / name).write_text('{"file_name": "0.png", "text": "one"}\n')
    else:
        pq.write_table(pa.table({"image": [b""], "text": ["one"]}), tmp_path / name)
    message = rf"two tables or more, {name}, a\.tar: give one as the path"
    if name.endswith("parquet"):
        message = rf"tars \(a\.tar\) and a table .*{name}\. Give the path"
    with pytest.raises(ConfigError, match=message):
        open_tars(tmp_path, **UNNAMED)
    if not name.endswith("parquet"):  # which lacks the columns that are asked for
        assert_rows(open_tars(tmp_path), range(5))


def test_a_tar_that_names_no_split_is_never_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "cars.tar", samples(range(5)))
    write_tar(tmp_path / "test-drive.tar", samples(range(5, 8)))
    source = open_tars(tmp_path)
    assert_rows(source, range(8))
    assert source.remarks == []
    write_tar(tmp_path / "test-000.tar", samples(range(8, 12)))
    write_tar(tmp_path / "val" / "0.tar", samples([12]))
    source = open_tars(tmp_path)
    assert_rows(source, range(8))
    assert source.remarks == [
        "left out: 4 rows of split 'test' (test-000.tar)",
        "left out: 1 row of split 'validation' (val/0.tar)",
    ]
    source = open_tars(tmp_path, split="test")
    assert_rows(source, range(8, 12))
    assert (
        source.remarks[0]
        == "left out: 8 rows of files that name no split (cars.tar, test-drive.tar)"
    )
    write_tar(tmp_path / "train" / "0.tar", samples([13]))
    assert_rows(open_tars(tmp_path), [*range(8), 13])
    source = open_tars(tmp_path, split="train")
    assert_rows(source, [13])
    assert (
        "left out: 8 rows of files that name no split (cars.tar, test-drive.tar)" in source.remarks
    )


def test_without_a_split_to_train_on_one_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "validation" / "0.tar", samples(range(3)))
    assert_rows(open_tars(tmp_path), range(3))
    write_tar(tmp_path / "test" / "0.tar", samples(range(3, 5)))
    with pytest.raises(
        ConfigError, match=r"no split 'train'; it has test, validation\. Choose one: --split test"
    ):
        open_tars(tmp_path)
    assert_rows(open_tars(tmp_path, split="validation"), range(3))
    assert_rows(open_tars(tmp_path, split="val"), range(3))
    with pytest.raises(ConfigError, match="no split 'dev2'; it has test, validation"):
        open_tars(tmp_path, split="dev2")


def test_versions_change_with_the_tar(tmp_path: Path, later: None) -> None:
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    kinds = "image", "conditioning_image"

    def versions() -> list[bytes | None]:
        source = open_tars(tmp_path)
        return [source.version(index, kind) for index in range(3) for kind in kinds]  # type: ignore[arg-type]

    first = versions()
    assert None not in first
    assert len(set(first)) == 6
    assert versions() == first
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert not set(versions()) & set(first)


def test_a_tar_that_changed_just_now_has_no_version(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(range(3)))
    assert open_tars(tmp_path).version(0, "image") is None


def test_a_tar_that_changes_during_a_run_ends_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    source = open_tars(tmp_path)
    os.utime(path, ns=(0, 5))
    with pytest.raises(RunError, match=r"a\.tar was changed while precompute was running"):
        source.read(0, "image")


def test_few_tars_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "NUM_OPEN_TARS", 2)
    for number in range(20):
        write_tar(tmp_path / f"{number:02d}.tar", samples([number]))
    source = open_tars(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert [source.read(index, "image") for index in range(20)] == list(map(image, range(20)))
    assert [source.read(index, "conditioning_image") for index in range(20)] == [
        control(number) for number in range(20)
    ]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", samples(range(3)))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert_rows(open_tars(tmp_path, cache_dir=tmp_path / "datasets"), range(3))
    assert sorted(tmp_path.rglob("*")) == before


def test_tars_without_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("README", b"")])
    with pytest.raises(ConfigError, match="no samples in it"):
        open_tars(tmp_path)
    write_tar(tmp_path / "a.tar", [("0.cls", b""), ("1.cls", b"")])
    with pytest.raises(ConfigError, match=r"no samples in it.*it has \.cls \(2\)"):
        open_tars(tmp_path)


def test_one_caption_for_all_needs_no_member(tmp_path: Path) -> None:
    members = [one for one in samples(range(3)) if not one[0].endswith(".txt")]
    source = open_tars(write_tar(tmp_path / "a.tar", members), caption="my {name}")
    rows = list(source.rows(range(3)))
    assert [row.prompt for row in rows] == [f"my 000{number}" for number in range(3)]
    assert [row.fault for row in rows] == [""] * 3


def test_samples_are_those_of_the_webdataset_library(tmp_path: Path) -> None:
    members = []
    for number in range(6):
        key = f"folder {number % 2}/{number:04d}"
        members += [*sample(number, key), (f"{key}.Depth.PNG", b"more"), (f"{key}.json", b"{}")]
    path = write_tar(tmp_path / "a.tar", members)
    library = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    expected = [(one["jpg"], one["png"], one["txt"].decode()) for one in library]
    source = open_tars(tmp_path)
    found = [
        (source.read(index, "image"), source.read(index, "conditioning_image"), row.prompt)
        for index, row in enumerate(source.rows(range(len(source))))
    ]
    assert found == expected
    assert len(found) == 6


def test_a_tar_is_no_zip_for_one_that_it_holds(tmp_path: Path) -> None:
    """`zipfile.is_zipfile` looks for the end of a zip anywhere in the last 64 KiB."""
    packed = io.BytesIO()
    np.savez(packed, depth=np.zeros(4))
    members = [*samples(range(2)), ("0001.npz", packed.getvalue())]
    path = write_tar(tmp_path / "a.tar", members)
    assert zipfile.is_zipfile(path)
    source = open_tars(path)
    assert_rows(source, range(2))
    assert source.remarks == ["not read: 1 members, .npz (1)"]
