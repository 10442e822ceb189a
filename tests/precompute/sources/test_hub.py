"""Data sets on the hub: a real HTTP server on loopback stands in for it."""

import hashlib
import http.server
import io
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import run_python
from tests.hub_server import serve_in_thread

CONVERSION = "refs/convert/parquet"
SCRIPT, SEVERAL, LONELY, GATED = "fusing/fill50k", "some/several", "some/lonely", "some/gated"
SPLITS = "some/splits"
OPEN = """
import json, sys
from precompute.sources.open_source import open_source
from precompute.sources.source import SourceSettings
from common.errors import ConfigError
try:
    source = open_source(SourceSettings(**json.loads(sys.argv[1])))
except ConfigError as error:
    print(f"ConfigError {error}")
else:
    for index, row in enumerate(source.rows(range(len(source)))):
        kinds = "image", "conditioning_image"
        print(json.dumps([row.prompt, *(source.read(index, kind).hex() for kind in kinds)]))
    for remark in source.remarks:
        print(remark)
"""


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(data, "PNG")
    return data.getvalue()


def parquet(rows: list[tuple[str, bytes, bytes]]) -> bytes:
    """A Parquet file as the hub's conversion writes it: images as bytes with a file name."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = {
        "image": pa.array([{"bytes": one, "path": None} for _, one, _ in rows], image),
        "conditioning_image": pa.array([{"bytes": one, "path": None} for *_, one in rows], image),
        "text": pa.array([text for text, *_ in rows]),
    }
    data = io.BytesIO()
    pq.write_table(pa.table(columns), data)
    return data.getvalue()


def sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


ROWS = [("a red circle", png("red"), png("black")), ("a blue circle", png("blue"), png("white"))]
REPOSITORIES = {
    SCRIPT: {
        "main": {"fill50k.py": b"raise SystemExit('was run')", "README.md": b"# fill50k"},
        CONVERSION: {"default/train/0000.parquet": parquet(ROWS)},
    },
    SEVERAL: {
        "main": {"several.py": b"raise SystemExit('was run')"},
        CONVERSION: {
            "big/train/0000.parquet": parquet(ROWS),
            "small/train/0000.parquet": parquet(ROWS[:1]),
        },
    },
    SPLITS: {
        "main": {
            "README.md": b"# two splits",
            "data/train-00000-of-00001.parquet": parquet(ROWS),
            "data/test-00000-of-00001.parquet": parquet(ROWS[1:]),
        },
    },
    LONELY: {"main": {"lonely.py": b"raise SystemExit('was run')"}},
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's routes that `datasets` asks for."""

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        parts = [urllib.parse.unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            name, route, rest = "/".join(parts[2:4]), parts[4:5], parts[5:]
            if (files := self.files(name, rest[0] if rest else "main")) is not None:
                self.answer_about(name, route[0] if route else "revision", rest, files)
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            name, revision, file = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
            if (files := self.files(name, revision)) is not None:
                if file in files:
                    self.answer(200, files[file], "application/octet-stream")
                else:
                    self.refuse(404, "EntryNotFound")
        else:
            self.refuse(404, "")

    do_HEAD = do_POST = do_GET

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        if name == GATED:
            self.refuse(403, "GatedRepo")
        elif name not in REPOSITORIES:
            self.refuse(401, "RepoNotFound")
        else:
            revisions = REPOSITORIES[name]
            revisions = revisions | {sha(one): files for one, files in revisions.items()}
            if revision in revisions:
                self.commit = revision if len(revision) == 40 else sha(revision)
                return revisions[revision]
            self.refuse(404, "RevisionNotFound")
        return None

    def answer_about(self, name: str, route: str, rest: list[str], files: dict[str, bytes]) -> None:
        if route == "revision":
            found: object = {
                "id": name,
                "sha": self.commit,
                "private": False,
                "gated": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": file} for file in files],
            }
        else:
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": sha(file)}
                for file, data in files.items()
            ]
            folders = {str(one) for file in files for one in PurePosixPath(file).parents}
            entries += [{"type": "directory", "path": one, "oid": sha(one)} for one in folders]
            if route == "paths-info":
                length = int(self.headers["Content-Length"])
                asked = urllib.parse.parse_qs(self.rfile.read(length).decode())["paths"]
                found = [one for one in entries if one["path"] in asked]
            else:
                folder = "/".join(rest[1:]) or "."
                if folder not in folders:
                    self.refuse(404, "EntryNotFound")
                    return
                inside = {one["path"]: one for one in entries if one["path"] != "."}
                found = [
                    one
                    for path, one in inside.items()
                    if str(PurePosixPath(path).parent) == folder
                    or (
                        "recursive=true" in self.path.lower()
                        and PurePosixPath(path).is_relative_to(folder)
                    )
                ]
        self.answer(200, json.dumps(found).encode(), "application/json")

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, b"{}", "application/json", {"X-Error-Code": code})

    def answer(
        self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        common = {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": getattr(self, "commit", ""),
        }
        for name, value in (common | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    serve_in_thread(server)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def open_in_a_process(
    endpoint: str, tmp_path: Path, offline: str = "0", **settings: str
) -> list[str]:
    done = run_python(
        "-c",
        OPEN,
        json.dumps(settings | {"cache_dir": str(tmp_path / "datasets")}),
        HF_ENDPOINT=endpoint,
        HF_HOME=str(tmp_path / "hub"),
        HF_HUB_OFFLINE=offline,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_of_a_script_data_set_the_hubs_conversion_is_read(endpoint: str, tmp_path: Path) -> None:
    expected = [[text, image.hex(), conditioning.hex()] for text, image, conditioning in ROWS]
    for _ in range(2):  # from the hub, and then with a cache
        *lines, copied = open_in_a_process(endpoint, tmp_path, dataset_name=SCRIPT)
        assert copied.startswith("copied by the datasets library: 0.0 MB of Arrow files in ")
        assert [json.loads(line) for line in lines] == expected


def test_of_several_configurations_the_named_one_is_read(endpoint: str, tmp_path: Path) -> None:
    settings = {"dataset_name": SEVERAL, "dataset_config_name": "small"}
    line, _ = open_in_a_process(endpoint, tmp_path, **settings)
    assert json.loads(line)[0] == "a red circle"


@pytest.mark.slow
def test_of_several_splits_one_is_read_and_the_others_are_counted(
    endpoint: str, tmp_path: Path
) -> None:
    red, blue, left_out, _ = open_in_a_process(endpoint, tmp_path, dataset_name=SPLITS)
    assert [json.loads(line)[0] for line in (red, blue)] == ["a red circle", "a blue circle"]
    assert left_out == "left out: 1 row of split 'test'"
    line, left_out, _ = open_in_a_process(endpoint, tmp_path, dataset_name=SPLITS, split="test")
    assert json.loads(line)[0] == "a blue circle"
    assert left_out == "left out: 2 rows of split 'train'"


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (SCRIPT, "main", "scripts are no longer supported, but found fill50k.py"),
        (SCRIPT, "v9", "--dataset-name fusing/fill50k has no revision 'v9'."),
        (LONELY, None, "the hub has no Parquet conversion of it"),
        (GATED, None, "is gated: accept its terms on its hub page"),
        ("no/body", None, "no such data set on the hub (or it is private"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_line(
    endpoint: str, tmp_path: Path, name: str, revision: str | None, message: str
) -> None:
    settings = {"dataset_name": name} | ({"dataset_revision": revision} if revision else {})
    (line,) = open_in_a_process(endpoint, tmp_path, **settings)
    assert line.startswith(f"ConfigError --dataset-name {name}"), line
    assert message in line


def test_a_hub_out_of_reach_is_named(endpoint: str, tmp_path: Path) -> None:
    (line,) = open_in_a_process(endpoint, tmp_path, offline="1", dataset_name=SCRIPT)
    assert "the hub could not be reached (ConnectionError)" in line
