"""A model hub on loopback: as much of the protocol as huggingface_hub uses with Xet off.

Repositories with commits, uploads through git-lfs and in the commit itself, listings by pages,
downloads through redirects and in ranges.
"""

import base64
import hashlib
import http.server
import json
import re
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "me"
PAGE = 7  # entries of a listing; few, so that listings have several pages
REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"


@dataclass
class Hub:
    """What the hub holds and was asked for.

    Attributes:
        url: to give as HF_ENDPOINT.
        commits: by "models/owner/name" or "datasets/owner/name": (commit, path -> bytes), in order.
        blobs: what was uploaded through git-lfs, by SHA-256.
        asked: "METHOD /path", in order, without queries.
        misbehave: gets (handler, "METHOD /path", how often that was asked for before) and either
            answers itself and returns True, or leaves it.
    """

    url: str = ""
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    misbehave: Callable[[Any, str, int], bool] = lambda *_: False

    def add(self, repo: str, files: dict[str, bytes]) -> None:
        """Commit files to a repository; it is made if there is none."""
        history = self.commits.setdefault(repo, [("0" * 40, {})])
        names = json.dumps([len(history), sorted(files)])
        history.append((hashlib.sha1(names.encode()).hexdigest(), history[-1][1] | files))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Return path -> bytes at a revision."""
        history = self.commits[repo]
        if revision == "main":
            return history[-1][1]
        return dict(history)[revision]

    def count(self, pattern: str) -> int:
        """Return how many requests match a regular expression."""
        return sum(re.search(pattern, line) is not None for line in self.asked)


def is_lfs(path: str) -> bool:
    """Tell whether a file is one that the hub's .gitattributes sends through git-lfs."""
    return path.endswith((".tar", ".safetensors", ".bin"))


def serve_in_thread(server: socketserver.BaseServer) -> None:
    """Serve until `server.shutdown()`, which by default takes up to half a second."""
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()


def start(hub: Hub) -> http.server.ThreadingHTTPServer:
    """Serve a hub on loopback, in a thread; `server.shutdown()` ends it."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    serve_in_thread(server)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        self.body = self._read_body()
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        asked = f"{self.command} {unquote(address.path)}"
        before = self.hub.asked.count(asked)
        self.hub.asked.append(asked)
        if self.hub.misbehave(self, asked, before):
            return
        # Revisions are quoted in paths: a%2Fb.
        for pattern, answer in (
            (r"POST /api/repos/create", self.create),
            (r"GET /api/whoami-v2", self.whoami),
            (r"POST /api/validate-yaml", lambda: self.send({"errors": [], "warnings": []})),
            (rf"GET {REPO}(?:/revision/([^/]+))?", self.info),
            (rf"GET {REPO}/tree/([^/]+)(?:/(.*))?", self.tree),
            (rf"POST {REPO}/preupload/([^/]+)", self.preupload),
            (rf"POST {REPO}/commit/([^/]+)", self.commit),
            (r"POST /(datasets/)?(.+)\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /lfs/([0-9a-f]+)", self.upload),
            (r"(?:GET|HEAD) /cdn/([0-9a-f]+)", lambda oid: self.data(self.hub.blobs[oid])),
            (r"(?:GET|HEAD) /(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, f"{self.command} {address.path}"):
                answer(*(unquote(part) if part else part for part in match.groups()))
                return
        self.refuse(404)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def create(self) -> None:
        asked = json.loads(self.body)
        kind = f"{asked.get('type') or 'model'}s"
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        path = name if kind == "models" else f"{kind}/{name}"
        if f"{kind}/{name}" in self.hub.commits:
            self.send({"error": "exists", "url": f"{self.hub.url}/{path}"}, 409)
            return
        self.hub.commits[f"{kind}/{name}"] = [("0" * 40, {})]
        self.send({"url": f"{self.hub.url}/{path}", "name": name})

    def whoami(self) -> None:
        self.send({"name": USER, "type": "user", "orgs": []})

    def info(self, kind: str, name: str, revision: str | None) -> None:
        if (found := self.at(kind, name, revision or "main")) is not None:
            commit, files = found
            siblings = [{"rfilename": path} for path in files]
            self.send({"id": name, "sha": commit, "siblings": siblings, "private": False})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        if (found := self.at(kind, name, revision)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder else ""
        inside = {path: data for path, data in found[1].items() if path.startswith(prefix)}
        if folder and not inside:
            self.refuse(404, "EntryNotFound")
            return
        recursive = self.query.get("recursive", [""])[0].lower() in ("true", "1")
        entries: dict[str, dict[str, Any]] = {}
        for path, data in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            if len(parts) == 1 or recursive:
                entries[path] = self.entry(path, data)
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "oid": "0", "size": 0}
        start = int(self.query.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + PAGE]
        more = {}
        if start + PAGE < len(entries):
            address = self.path.partition("?")[0]
            options = f"recursive={recursive}&cursor={start + PAGE}"
            more = {"Link": f'<{self.hub.url}{address}?{options}>; rel="next"'}
        self.send(page, headers=more)

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
        if is_lfs(path):
            digest = hashlib.sha256(data).hexdigest()
            lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
            return entry | {"oid": "0" * 40, "lfs": lfs}
        return entry | {"oid": git_blob(data)}

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if (found := self.at(kind, name, revision)) is None:
            return
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            answer = {"path": path, "shouldIgnore": False}
            answer["uploadMode"] = "lfs" if is_lfs(path) else "regular"
            if (data := found[1].get(path)) is not None:
                lfs = is_lfs(path)
                answer["oid"] = hashlib.sha256(data).hexdigest() if lfs else git_blob(data)
            answers.append(answer)
        self.send({"files": answers})

    def batch(self, _: str | None, name: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = dict(asked)
            if asked["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400)
            return
        self.hub.blobs[oid] = self.body
        self.send({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        if (found := self.at(kind, name, revision)) is None:
            return
        files = dict(found[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                self.refuse(404, "EntryNotFound")
                return
        history = self.hub.commits[f"{kind}/{name}"]
        commit = hashlib.sha1(f"{name} {len(history)}".encode()).hexdigest()
        history.append((commit, files))
        address = f"{self.hub.url}/{name}/commit/{commit}"
        self.send({"commitUrl": address, "commitOid": commit, "success": True})

    def resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        if (found := self.at("datasets" if prefix else "models", name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound")
            return
        data = files[path]
        entry = self.entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if "lfs" not in entry:
            self.data(data, headers)
            return
        self.hub.blobs[etag] = data
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        # Another host, as the hub's is: clients follow others before they look at the headers.
        elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
        headers |= {"Location": f"{elsewhere}/cdn/{etag}"}
        self.send({}, 302, headers)

    def at(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return (commit, its files), or refuse as the hub does."""
        history = self.hub.commits.get(f"{kind}/{name}")
        if history is None:  # nor does the hub tell a stranger what is private
            self.refuse(401, "RepoNotFound")
            return None
        known = dict(history) | {"main": history[-1][1]}
        if revision not in known:
            self.refuse(404, "RevisionNotFound")
            return None
        return (history[-1][0] if revision == "main" else revision), known[revision]

    def data(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Send a file, or the rest of it that is asked for."""
        headers, status, first = dict(headers or {}), 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first, status = int(match[1]), 206
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self.answer(data[first:], status, headers)

    def send(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps(document).encode(), status, headers or {})

    def refuse(self, status: int, code: str = "") -> None:
        self.send({"error": code}, status, {"X-Error-Code": code} if code else {})

    def answer(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def git_blob(data: bytes) -> str:
    """Return the name that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return path -> bytes of all files in a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
