"""What is asked for again, by every protocol: what can get better, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShardError
from shards.remote.folder import RemoteFolder
from tests.shards.remote.conftest import Server

pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture(params=["http", "s3"])
def refusing(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    serve: Callable[[Path], Server],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int], tuple[RemoteFolder, Server]]:
    """Give a folder on a server that answers everything with a status."""

    def call(status: int) -> tuple[RemoteFolder, Server]:
        def refuses(handler: Any, *_: Any) -> bool:
            handler.send_error(status)
            return True

        server = serve(tmp_path)
        server.misbehave = refuses
        if request.param == "http":
            return RemoteFolder(f"{server.url}/cache"), server
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # its own, within each of ours
        return RemoteFolder("s3://bucket/cache"), server

    return call


@pytest.mark.parametrize("status", [401, 403, 404, 422])
def test_a_refusal_is_final(
    refusing: Callable[[int], tuple[RemoteFolder, Server]], status: int
) -> None:
    folder, server = refusing(status)
    reason = "no such file there" if status == 404 else f"the server answers {status}"
    with pytest.raises(ShardError, match=rf"^{folder}/file: {reason}") as raised:
        folder.read("file")
    assert "\n" not in str(raised.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [408, 429, 503])
def test_a_fault_that_passes_is_tried_again(
    refusing: Callable[[int], tuple[RemoteFolder, Server]], status: int
) -> None:
    folder, server = refusing(status)
    with pytest.raises(
        ShardError, match=rf"^{folder}/file: the server answers {status} .*tried 6 times"
    ):
        folder.read("file")
    assert len(server.asked) >= 6
