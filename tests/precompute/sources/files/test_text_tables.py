"""Tables of text that name images: metadata.jsonl and .csv, other tables, prompt.json, clones."""

import csv
import io
import json
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from precompute.planning.inventory import FORMER_WORDING
from precompute.sources.files.records import read_records
from tests.precompute.sources.files.flat_pictures import (
    caption,
    level,
    lines,
    numbers,
    opened,
    photographs,
    picture,
    record,
    write,
    write_control,
    write_image,
    write_pair,
    zipped,
)


def with_pairs(folder: Path, count: int = 4) -> Path:
    for number in range(count):
        write_pair(folder, number)
    return folder


def comma_separated(records: list[dict[str, Any]], separator: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def renamed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {
        "file_name": "image",
        "conditioning_image_file_name": "conditioning_image",
        "text": "text",
    }
    return [{names[key]: value for key, value in one.items()} for one in records]


RECORDS = [record(number) for number in range(4)]
TABLES: dict[str, Callable[[], str | bytes]] = {
    "metadata.jsonl": lambda: lines(RECORDS),
    "metadata.csv": lambda: comma_separated(RECORDS),
    "rows.jsonl": lambda: lines(renamed(RECORDS)),
    "rows.JSON": lambda: lines(RECORDS),
    "list.json": lambda: json.dumps(RECORDS, indent=2),
    "rows.csv": lambda: comma_separated(renamed(RECORDS)),
    "rows.tsv": lambda: comma_separated(RECORDS, "\t"),
    "semicolons.csv": lambda: comma_separated(RECORDS, ";"),
    "marked.csv": lambda: comma_separated(RECORDS).encode("utf-8-sig"),
    "marked.jsonl": lambda: lines(RECORDS).encode("utf-8-sig"),
    "marked.json": lambda: json.dumps(RECORDS).encode("utf-8-sig"),
    "wide.csv": lambda: comma_separated(RECORDS).encode("utf-16"),
    "wide.jsonl": lambda: lines(RECORDS).encode("utf-16"),
    "test.jsonl": lambda: lines(RECORDS),
    "prompt.json": lambda: lines(
        {"target": f"images/{n}.png", "source": f"edges/{n}.png", "prompt": caption(n)}
        for n in range(4)
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    folder = with_pairs(tmp_path / "mine")
    table = write(folder / name, TABLES[name]())
    words = "ControlNet's prompt.json" if name == "prompt.json" else f"table {name}"
    for path in (folder, table):
        source = opened(path)
        assert numbers(source) == [0, 1, 2, 3]
        assert source.layout == words
        assert source.remarks == []
        assert numbers(photographs(path)) == [0, 1, 2, 3]
    archive = zipped(folder, tmp_path / "mine.zip", "mine/")
    source = opened(archive)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == f"{words}, in a zip"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_table_in_each_folder_one_of_them_linked(tmp_path: Path, name: str) -> None:
    for folder, inside in (("mine/a", range(2)), ("elsewhere", range(2, 4))):
        for number in inside:
            write_pair(tmp_path / folder, number)
        records = [record(number) for number in inside]
        text = lines(records) if name.endswith("jsonl") else comma_separated(records)
        write(tmp_path / folder / name, text)
    (tmp_path / "mine" / "b").symlink_to(tmp_path / "elsewhere")
    source = opened(tmp_path / "mine")
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == f"2 tables (a/{name}, b/{name})"
    assert [row.where.removeprefix("b/") for row in source.rows([3])] == [
        f"{name}, line {2 if name.endswith('jsonl') else 3}"
    ]


def test_a_table_in_a_split_names_its_images_from_above(tmp_path: Path) -> None:
    with_pairs(tmp_path / "mine" / "train")
    records = [record(n, f"train/images/{n}.png", f"train/edges/{n}.png") for n in range(4)]
    write(tmp_path / "mine" / "train" / "metadata.jsonl", lines(records))
    for path in ("mine", "mine/train", "mine/train/metadata.jsonl"):
        assert numbers(opened(tmp_path / path)) == [0, 1, 2, 3]
    zipped(tmp_path / "mine", tmp_path / "mine.zip")
    assert numbers(opened(tmp_path / "mine.zip")) == [0, 1, 2, 3]


def test_names_are_found_as_people_write_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    one, two = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    written = {
        "images\\0.png": "images/0.png",
        "./images/1.png": "images/1.png",
        f"images/{one}.png": f"images/{two}.png",
        f"images/{two}3.png": f"images/{one}3.png",
        "images/4.png": "images/4.PNG",
        "images/5.JPG": "images/5.jpg",
        str(tmp_path / "absolute.png"): str(tmp_path / "absolute.png"),
        "~/home.png": str(tmp_path / "home.png"),
        "../above.png": str(tmp_path / "above.png"),
        "a\\b.png": "a\\b.png",
    }
    monkeypatch.setenv("HOME", str(tmp_path))
    for number, place in enumerate(written.values()):
        write_image(folder / place, number)
    rows = [{"file_name": name, "text": caption(n)} for n, name in enumerate(written)]
    write(folder / "metadata.jsonl", lines(rows))
    assert numbers(photographs(folder)) == list(range(len(written)))


def test_what_is_not_found_is_named(tmp_path: Path) -> None:
    names = ["images/0.png ", f"{'x' * 300}.png", "none.png"]
    write_pair(tmp_path, 0)
    rows = [{"file_name": name, "text": "a"} for name in names]
    write(tmp_path / "metadata.jsonl", lines(rows))
    source = photographs(tmp_path)
    quoted = ["'images/0.png '", f"{'x' * 48}…{'x' * 43}.png", "none.png"]
    for index, row in enumerate(source.rows(range(3))):
        assert row.name == f"line {index + 1}, {quoted[index]}"
        with pytest.raises(OSError, match=r"No such file|name too long"):
            source.read(index, "image")


def test_captions_are_text_as_typed(tmp_path: Path) -> None:
    texts = ["null", "None", "NA", "nan", "NULL", "N/A", "", "1.50", "007", "True", "1e5", " a "]
    texts += ['a "quoted" word', "a, b", "two\nlines", "é ☃"]
    write_pair(tmp_path, 0)
    write(tmp_path / "metadata.csv", comma_separated([record(0) | {"text": t} for t in texts]))
    rows = list(opened(tmp_path).rows(range(len(texts))))
    assert [row.prompt for row in rows] == texts
    assert not any(row.fault for row in rows)
    # Two lines of the header and of the caption with a line break before the last one.
    assert rows[-1].where == f"line {len(texts) + 2}"


def test_captions_in_json_pass_as_they_are(tmp_path: Path) -> None:
    captions: list[Any] = ["one", ["two", "three"], None, 4, {"a": 1}, "half \ud83d", [], True]
    write_pair(tmp_path, 0)
    write(tmp_path / "metadata.jsonl", lines(record(0) | {"text": one} for one in captions))
    assert [row.prompt for row in opened(tmp_path).rows(range(len(captions)))] == captions


@pytest.mark.parametrize("name", ["prompt.json", "metadata.jsonl", "list.json"])
def test_a_broken_record_is_one_bad_row(tmp_path: Path, name: str) -> None:
    with_pairs(tmp_path)
    keys = ("target", "source", "prompt") if name == "prompt.json" else tuple(record(0))
    good: list[Any] = [dict(zip(keys, record(n).values(), strict=True)) for n in range(4)]
    broken: list[Any] = [
        {key: good[0][key] for key in keys[1:]},
        {key: good[0][key] for key in (keys[0], keys[2])},
        {key: good[0][key] for key in keys[:2]},
        dict.fromkeys(keys),
        good[0] | {keys[0]: 3},
        [1, 2],
    ]
    faults = ["", "", "", "", f"{keys[0]} is not a file name but int", "not a JSON object but list"]
    if name == "list.json":
        write(tmp_path / name, json.dumps([*good, *broken]))
    else:
        write(tmp_path / name, lines([*good[:2], "", *good[2:], *broken, '{"text": ']))
        faults.append("not JSON (Expecting value: line 1 column 10 (char 9))")
    source = opened(tmp_path)
    assert len(source) == 4 + len(faults)
    rows = list(source.rows(range(len(source))))
    assert [row.fault for row in rows] == [""] * 4 + faults
    assert [row.prompt for row in rows[:4]] == list(map(caption, range(4)))
    assert rows[4].image == rows[7].image == ""
    assert (rows[5].conditioning_image, rows[6].prompt) == ("", None)
    for index, kind in ((4, "image"), (5, "conditioning_image")):
        with pytest.raises(OSError, match=f"^no {kind.replace('_', ' ')}$"):
            source.read(index, kind)  # type: ignore[arg-type]
    assert rows[4].where == f"line {5 if name == 'list.json' else 6}"


def test_a_broken_line_of_csv_is_one_bad_row(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    text = comma_separated(RECORDS[:2]) + 'a.png,b.png\r\n"a"b,c,d\r\n\r\n'
    text += comma_separated(RECORDS[2:]).partition("\r\n")[2]
    write(tmp_path / "metadata.csv", text)
    rows = list(opened(tmp_path).rows(range(6)))
    assert [row.prompt for row in rows] == [
        caption(0),
        caption(1),
        None,
        None,
        *map(caption, (2, 3)),
    ]
    assert rows[2].fault == "2 values, 3 expected as in the first line"
    assert rows[3].fault.startswith("not CSV (',' expected after")
    assert [row.where for row in rows] == [f"line {n}" for n in (2, 3, 4, 5, 7, 8)]


NEVER = "a quotation mark is opened here and never closed"
BEFORE = "a quotation mark is opened here and not closed before the next row"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('1.png,"a\n2.png,b\n3.png,"c"\n4.png,d\n', [BEFORE, "b", "c", "d"]),
        ('1.png,"a\n2.png,b\n3.png,c"\n4.png,d\n', [BEFORE, "b", 'c"', "d"]),
        ('1.png,"a\n2.png,"b\n3.png,c\n', [BEFORE, BEFORE, "c"]),
        ('1.png,"a\n2.png,""\n3.png,"c, d"\n', [BEFORE, "", "c, d"]),
        ('1.png,a\n2.png,"b\nx\n', ["a", NEVER, "1 values, 2 expected as in the first line"]),
        ('1.png,"a\nb, c\n""d"", e"\n2.png,b\n', ['a\nb, c\n"d", e', "b"]),
        ('1.png,a,"b\n2.png,c"\n3.png,d\n', ["3 values, 2 exp", 'c"', "d"]),
        ('1.png,12" by 9"\n2.png,b\n', ['12" by 9"', "b"]),
    ],
)
def test_a_stray_quotation_mark_makes_a_bad_row_of_its_line_alone(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    write(tmp_path / "rows.csv", f"file_name,text\n{text}")
    source = photographs(tmp_path / "rows.csv")
    rows = list(source.rows(range(len(source))))
    for row, one in zip(rows, expected, strict=True):
        assert (row.fault or row.prompt).startswith(one)
    starts = [n for n, line in enumerate(text.splitlines(), 2) if ".png" in line or line == "x"]
    assert [row.where for row in rows] == [f"line {number}" for number in starts]


def test_a_value_over_several_lines_may_end_beside_a_file_name(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", 'text,file_name\n"a,\nb",1.png\nc,2.png\n')
    rows = list(photographs(tmp_path / "rows.csv").rows(range(2)))
    assert [(row.image, row.prompt) for row in rows] == [("1.png", "a,\nb"), ("2.png", "c")]


def test_where_quotation_marks_are_never_closed_the_table_is_read_once(tmp_path: Path) -> None:
    rows = [f'{n}.png,"stray' if n % 2 else f'{n}.png,""' for n in range(20_000)]
    write(tmp_path / "rows.csv", "\n".join(["file_name,text", *rows]))
    source = photographs(tmp_path / "rows.csv")
    assert sum(bool(row.fault) for row in source.rows(range(20_000))) == 10_000


@pytest.mark.parametrize(
    ("start", "separator"),
    [
        ("", ","),
        ("\n\r\n  \n", ","),
        ("", ";"),
        ("sep=;\r\n", ";"),
        ("\nsep=;\n", ";"),
        ("sep=|\n", "|"),
        ("", "\t"),
    ],
)
def test_what_spreadsheets_write_before_and_between_the_values(
    tmp_path: Path, start: str, separator: str
) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "rows.csv", start + comma_separated(RECORDS, separator))
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    first = 2 + start.count("\n")
    assert [row.where for row in source.rows([0])] == [f"line {first}"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "file_name;text;width, height\n1.png;a, b;4\n"),
        ("rows.csv", "file_name\ttext\twidth, height\n1.png\ta, b\t4\n"),
        ("rows.tsv", "file_name\ttext, in English, French\ttext\n1.png\t4\ta, b\n"),
        ("rows.tsv", 'file_name,text\n1.png,"a, b"\n'),
    ],
)
def test_the_first_line_shows_the_separator(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / name, text)
    assert [row.prompt for row in photographs(tmp_path / name).rows([0])] == ["a, b"]


def test_a_table_that_is_not_utf8_says_how_to_convert_it(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", "file_name,text\n1.png,café\n2.png,tea\n".encode("latin-1"))
    one, two = photographs(tmp_path / "rows.csv").rows(range(2))
    assert one.fault.startswith("the caption is not UTF-8: perhaps Latin-1")
    assert "iconv -f WINDOWS-1252 -t UTF-8" in one.fault
    assert one.fault.partition(":")[0] in FORMER_WORDING  # as caches of before know it
    assert (two.prompt, two.fault) == ("tea", "")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("inner", [None, "text"])
def test_a_json_object_of_captions_by_file_names(
    tmp_path: Path, indent: int | None, inner: str | None
) -> None:
    with_pairs(tmp_path)
    rows = {f"images/{n}.png": {inner: caption(n)} if inner else caption(n) for n in range(4)}
    write(tmp_path / "captions.json", "\n" + json.dumps(rows, indent=indent))
    source = photographs(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == "table captions.json"


def test_nothing_but_broken_lines_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "metadata.jsonl", "\n{bad\nworse}\n")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 2: not JSON .*No row of this"):
        opened(tmp_path)
    write(tmp_path / "metadata.jsonl", " \n")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl: holds no rows"):
        opened(tmp_path)
    for text in ("{}", "[{}]"):
        write(tmp_path / "list.json", text)
        with pytest.raises(ConfigError, match=r"list\.json: its rows have no columns\. No row"):
            opened(tmp_path / "list.json")
    write(tmp_path / "wide.jsonl", json.dumps(dict.fromkeys(map(str, range(21)))))
    with pytest.raises(ConfigError, match=r"no column 'image'; it has 0, 1, .*, 19, …\. Name it"):
        opened(tmp_path / "wide.jsonl")
    write(tmp_path / "list.json", "[{}, ")
    with pytest.raises(ConfigError, match=r"list\.json: not a JSON list"):
        opened(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("metadata.jsonl", "metadata.csv"), "metadata.csv, metadata.jsonl"),
        (("metadata.jsonl", "a.parquet"), "metadata.jsonl, a.parquet"),
        (("rows.csv", "rows.jsonl"), "rows.csv, rows.jsonl"),
        (("rows.csv", "data/a.parquet"), "rows.csv, data/a.parquet"),
        (("rows.jsonl", "a.tar"), "rows.jsonl, a.tar"),
    ],
)
def test_two_tables_are_refused(tmp_path: Path, names: tuple[str, str], message: str) -> None:
    with_pairs(tmp_path)
    texts = {"jsonl": lines(RECORDS), "csv": comma_separated(RECORDS)}
    for name in names:
        write(tmp_path / name, texts.get(name.rpartition(".")[2], "PAR1"))
    with pytest.raises(ConfigError, match=f"two tables or more, {message}: give one as the path"):
        opened(tmp_path)
    assert numbers(opened(tmp_path / names[0])) == [0, 1, 2, 3]


def test_a_table_without_images_is_named_where_another_is_read(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "rows.jsonl", lines(RECORDS))
    write(tmp_path / "sizes.json", json.dumps({"width": 4}))
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == ["tables without images, not read: 1 (sizes.json)"]
    (tmp_path / "rows.jsonl").rename(tmp_path / "prompts.jsonl")
    write(tmp_path / "prompt.json", TABLES["prompt.json"]())
    assert opened(tmp_path).remarks == [
        "tables and tars that are not read: 2 (prompts.jsonl, sizes.json)"
    ]


def test_missing_columns_are_named_with_the_option(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "rows.csv", "picture,caption\nimages/0.png,number 0\n")
    for settings, message in (
        ({}, r"rows\.csv: no column 'image'; it has picture, caption\. Name it: --image-column"),
        ({"image_column": "picture"}, r"no column 'text'; .* --caption-column caption\?"),
    ):
        with pytest.raises(ConfigError, match=message):
            photographs(tmp_path, **settings)
    columns = {"image_column": "picture", "caption_column": "caption"}
    assert numbers(photographs(tmp_path, **columns)) == [0]
    with pytest.raises(ConfigError, match=r"no column 'conditioning_image'; .*--conditioning-from"):
        opened(tmp_path, **columns)
    rows = photographs(tmp_path, image_column="picture", caption="{name}").rows([0])
    assert [row.prompt for row in rows] == ["0"]
    write(tmp_path / "prompt.json", lines([{"target": "a", "prompt": "b"}] * 2))
    with pytest.raises(ConfigError, match=r'no source in any line; expected \{"target": …, "sour'):
        opened(tmp_path)


def test_tables_of_splits(tmp_path: Path) -> None:
    for folder, inside in (("validation", range(2)), ("test", range(2, 5))):
        for number in inside:
            write_pair(tmp_path / folder, number)
        write(tmp_path / folder / "metadata.jsonl", lines(record(n) for n in inside))
    with pytest.raises(ConfigError, match=r"no split 'train'; it has .*--split"):
        opened(tmp_path)
    source = opened(tmp_path, split="val")
    assert numbers(source) == [0, 1]
    assert source.remarks == ["left out: 3 rows of split 'test'"]
    (tmp_path / "test").rename(tmp_path / "train")
    source = opened(tmp_path)
    assert numbers(source) == [2, 3, 4]
    assert source.remarks == ["left out: 2 rows of split 'validation'"]


def test_tables_beside_each_other_are_splits_or_parts(tmp_path: Path) -> None:
    with_pairs(tmp_path, 6)
    for name, inside in (("a", [0, 1]), ("b", [2]), ("test", [3, 4])):
        write(tmp_path / f"{name}.jsonl", lines(record(n) for n in inside))
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2]
    assert source.layout == "2 tables (a.jsonl, b.jsonl)"
    assert source.remarks == ["left out: 2 rows of split 'test'"]
    assert numbers(opened(tmp_path, split="test")) == [3, 4]
    with pytest.raises(ConfigError, match="no split 'dev'"):
        opened(tmp_path / "a.jsonl", split="dev")


def write_clone(folder: Path, prefix: str = "{}/") -> None:
    """A clone of fusing/fill50k: a script, a table, and two zips."""
    write(folder / "fill50k.py", "raise SystemExit('was run')")
    write(folder / "README.md", "---\ndataset_info: {}\n---")
    write(folder / ".gitattributes", "*.zip filter=lfs")
    for kind, write_one in (("images", write_image), ("conditioning_images", write_control)):
        for number in range(4):
            write_one(folder / kind / f"{number}.png", number)
        zipped(folder / kind, folder / f"{kind}.zip", prefix.format(kind))
        (folder / kind).rmdir()
    rows = [record(n, control=f"conditioning_images/{n}.png") for n in range(4)]
    write(folder / "train.jsonl", lines(renamed(rows)))


@pytest.mark.parametrize("prefix", ["{}/", "", "data/{}/"])
def test_a_clone_of_fill50k_is_read_from_its_zips(tmp_path: Path, prefix: str) -> None:
    write_clone(tmp_path / "fill50k", prefix)
    source = opened(tmp_path / "fill50k")
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == "table train.jsonl, and files in conditioning_images.zip, images.zip"
    assert source.remarks == []


def test_zips_beside_a_table_are_not_read_where_its_files_are_there(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "metadata.jsonl", lines(RECORDS))
    write(tmp_path / "broken.zip", "no zip")
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.remarks == ["zips that are not read: 1 (broken.zip)"]


def test_a_missing_picture_is_not_taken_from_a_zip_that_has_one_of_its_name(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "metadata.jsonl", lines(RECORDS))
    missing = tmp_path / RECORDS[3]["file_name"]
    with zipfile.ZipFile(tmp_path / "backup.zip", "w") as packed:
        packed.writestr(f"old/{RECORDS[3]['file_name']}", missing.read_bytes())
    missing.unlink()
    source = opened(tmp_path)
    with pytest.raises(FileNotFoundError):
        source.read(3, "image")
    assert source.remarks == ["zips that are not read: 1 (backup.zip)"]


@pytest.mark.parametrize("first_in", ["folder", "zip"])
@pytest.mark.parametrize("prefix", ["", "more/", "data/more/"])
def test_some_files_lie_in_the_folder_and_others_in_a_zip_of_their_folders_name(
    tmp_path: Path, first_in: str, prefix: str
) -> None:
    for number in range(150):
        in_zip = (number < 100) == (first_in == "zip")
        write_image(tmp_path / ("more" if in_zip else "images") / f"{number}.png", number % 25)
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")]
    names.sort(key=lambda name: int(Path(name).stem))
    rows = [{"file_name": one, "text": caption(n % 25)} for n, one in enumerate(names)]
    zipped(tmp_path / "more", tmp_path / "more.zip", prefix)
    (tmp_path / "more").rmdir()
    write(tmp_path / "metadata.jsonl", lines(rows))
    write(tmp_path / "broken.zip", "no zip")
    if first_in == "zip":
        (tmp_path / "broken.zip").unlink()
    source = photographs(tmp_path)
    assert numbers(source) == [number % 25 for number in range(150)]
    assert source.layout == "table metadata.jsonl, and files in more.zip"
    left = ["zips that are not read: 1 (broken.zip)"] if first_in == "folder" else []
    assert source.remarks == left


def test_a_zip_beside_the_folder_of_its_name_stands_in_for_nothing(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "metadata.jsonl", lines(RECORDS))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as packed:
        packed.write(tmp_path / "images" / "3.png", "3.png")
    (tmp_path / "images" / "3.png").unlink()
    source = opened(tmp_path)
    with pytest.raises(FileNotFoundError):
        source.read(3, "image")
    assert source.remarks == ["zips that are not read: 1 (images.zip)"]


def test_a_zip_stands_for_the_folder_of_its_name_alone(tmp_path: Path) -> None:
    with_pairs(tmp_path, 2)
    rows = [*RECORDS[:2], record(2, "more/2.png"), record(3)]
    write(tmp_path / "metadata.jsonl", lines(rows))
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as packed:
        for name, number in (("2.png", 2), ("images/3.png", 9)):
            packed.writestr(name, picture(level(number)))
    source = opened(tmp_path)
    assert source.read(2, "image") == picture(level(2))
    for index, kind in ((3, "image"), (2, "conditioning_image")):
        with pytest.raises(FileNotFoundError):
            source.read(index, kind)  # type: ignore[arg-type]


def test_what_only_looks_like_a_zip_is_no_zip(tmp_path: Path) -> None:
    write_clone(tmp_path, "")
    (tmp_path / "._images.zip").write_bytes(b"of a Mac")
    (tmp_path / "folder.zip").mkdir()
    assert numbers(opened(tmp_path)) == [0, 1, 2, 3]


def test_a_link_to_itself_is_passed_over(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "metadata.jsonl", lines(RECORDS))
    (tmp_path / "self").symlink_to("self")
    assert numbers(opened(tmp_path)) == [0, 1, 2, 3]


def test_a_name_in_two_zips_is_a_bad_row(tmp_path: Path) -> None:
    write_clone(tmp_path, "")
    rows = [record(n, f"{n}.png", f"{n}.png") for n in range(4)]
    write(tmp_path / "train.jsonl", lines(rows))
    source = opened(tmp_path)
    with pytest.raises(OSError, match=r"^is in conditioning_images\.zip and in images\.zip$"):
        source.read(0, "image")
    assert source.version(0, "image") is None


def test_a_zip_with_two_members_of_a_name_says_so(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("0.txt", caption(0))
        packed.writestr("0.png", b"old")
        with pytest.warns(UserWarning, match="Duplicate name"):
            packed.writestr("0.png", picture(10))
    source = photographs(tmp_path / "a.zip")
    assert numbers(source) == [0]
    assert source.remarks == ["not read, since the zip has a later one of the name: 1 (0.png)"]


def test_pictures_with_captions_beside_tars_are_two_data_sets(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", 0)
    write(tmp_path / "0.txt", caption(0))
    write(tmp_path / "a.tar", b"")
    with pytest.raises(
        ConfigError, match=r"two data sets, 1 pictures with caption files and a\.tar: "
    ):
        photographs(tmp_path)


def test_records_come_without_reading_all(tmp_path: Path) -> None:
    """A table is read as it comes, however long it is."""
    table = write(tmp_path / "a.jsonl", lines([{"n": n} for n in range(1000)] + ["bad"]))
    with table.open("rb") as stream:
        found = list(read_records(stream, "a.jsonl", "a.jsonl"))
    assert [number for number, _ in found] == list(range(1, 1002))
    assert [one["n"] for _, one in found[:-1] if isinstance(one, dict)] == list(range(1000))
    assert isinstance(found[-1][1], str)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("metadata.jsonl", "caption_extension"),
        ("a.parquet", "caption_extension"),
        ("a.parquet", "conditioning_data_dir"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, name: str, option: str) -> None:
    with_pairs(tmp_path)
    write(tmp_path / name, lines(RECORDS) if name.endswith("jsonl") else "PAR1")
    flag = f"--{option.replace('_', '-')}"
    with pytest.raises(ConfigError, match=f"{flag} goes with files that belong together"):
        opened(tmp_path, **{option: str(tmp_path / "edges")})


def test_prompt_json_in_folders(tmp_path: Path) -> None:
    for name, inside in (("b", range(2, 4)), ("a", range(2)), ("test", range(4, 5))):
        for number in inside:
            write_pair(tmp_path / name, number)
        records = (
            {"target": f"images/{n}.png", "source": f"edges/{n}.png", "prompt": caption(n)}
            for n in inside
        )
        write(tmp_path / name / "prompt.json", lines(records))
    write(tmp_path / "a" / "old.tar", b"")
    source = opened(tmp_path)
    assert numbers(source) == [0, 1, 2, 3]
    assert source.layout == "2 tables (a/prompt.json, b/prompt.json)"
    assert source.remarks == [
        "left out: 1 row of split 'test'",
        "tables and tars that are not read: 1 (a/old.tar)",
    ]


def test_a_missing_file_is_never_replaced_by_another_of_its_name(tmp_path: Path) -> None:
    write_image(tmp_path / "3.png", 9)
    for name, inside in (("a", range(4)), ("b", range(4, 6))):
        for number in inside:
            write_image(tmp_path / name / f"{number}.png", number)
        records = [{"file_name": f"{n}.png", "text": caption(n)} for n in inside]
        write(tmp_path / name / "metadata.jsonl", lines(records))
    (tmp_path / "a" / "3.png").unlink()
    source = photographs(tmp_path)
    with pytest.raises(OSError, match="No such file"):
        source.read(3, "image")
    assert source.version(3, "image") is None


def test_each_table_has_its_own_way_to_name_files(tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 2)):
        for number in range(start, start + 2):
            write_image(tmp_path / name / f"{number}.png", number)
    texts = {"a": "{}.png", "b": "b/{}.png"}
    for name, numbers_of in (("a", (0, 1)), ("b", (2, 3))):
        records = [{"file_name": texts[name].format(n), "text": caption(n)} for n in numbers_of]
        write(tmp_path / name / "metadata.jsonl", lines(records))
    assert numbers(photographs(tmp_path)) == [0, 1, 2, 3]
    (tmp_path / "lists").mkdir()
    table = write(tmp_path / "lists" / "c.csv", "image,text\na/0.png,number 0\n")
    assert numbers(photographs(table)) == [0]


def test_pictures_that_no_row_names_are_counted(tmp_path: Path) -> None:
    with_pairs(tmp_path)
    write(tmp_path / "metadata.jsonl", lines(RECORDS[:3]))
    assert opened(tmp_path).remarks == ["pictures that no row names, or no option asks for: 2 of 8"]
    assert photographs(tmp_path).remarks == [
        "pictures that no row names, or no option asks for: 5 of 8"
    ]


def test_a_file_that_is_no_table_does_not_hide_what_is_missing(tmp_path: Path) -> None:
    write_image(tmp_path / "0.png", 0)
    write(tmp_path / "package.json", json.dumps({"a": 1}, indent=2))
    with pytest.raises(ConfigError, match="1 images and no captions"):
        photographs(tmp_path)
    (tmp_path / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"package\.json, line 1: not JSON"):
        photographs(tmp_path)
