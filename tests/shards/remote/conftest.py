"""A web server on loopback that misbehaves as a test wants."""

import http.server
import socketserver
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shards.remote import retry
from tests.hub_server import serve_in_thread


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, and give up on a silent server soon."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "STALL_S", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@dataclass
class Server:
    """What a test's HTTP server does, and what it was asked for.

    Attributes:
        url: of the folder it serves.
        misbehave: gets (handler, path, how often it was asked for before, the file's bytes) and
            either answers itself and returns True, or leaves it.
        asked: paths, in order.
    """

    url: str = ""
    misbehave: Callable[[Any, str, int, bytes], bool] = lambda *_: False
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def serve() -> Iterator[Callable[[Path], Server]]:
    """Serve folders over HTTP."""
    running: list[socketserver.BaseServer] = []

    def start(folder: Path) -> Server:
        server = Server()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                before = server.asked.count(path)
                server.asked.append(path)
                file = folder / path
                data = file.read_bytes() if file.is_file() else b""
                if not server.misbehave(self, path, before, data):
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        address = ("127.0.0.1", 0)
        listening = http.server.ThreadingHTTPServer(address, partial(Handler, directory=folder))
        serve_in_thread(listening)
        running.append(listening)
        server.url = f"http://127.0.0.1:{listening.server_address[1]}"
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
