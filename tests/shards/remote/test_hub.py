"""push, pull and training against a hub-shaped server on loopback, with the real client."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from common.errors import ConfigError, ShardError
from shards import verify
from shards.format import manifest
from shards.reading.cache import Cache
from shards.remote import hub_push, retry, transfer
from shards.remote.folder import RemoteFolder
from shards.remote.streaming import RemoteFiles
from tests.conftest import Outcome, reseal
from tests.hub_server import Hub
from tests.shards.remote.test_streaming import everything, same
from tests.shards.remote.test_transfer import files
from train.config import TrainConfig
from train.run import train

REPO = "datasets/me/circles"
URL = f"hf://{REPO}"
COMMITS = r"^POST /api/.*/commit/"
UPLOADS = r"^PUT /lfs/"
pytestmark = pytest.mark.usefixtures("hub")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


def num_shards(cache: Path) -> int:
    return verify.num_shards(manifest.load(cache))


def push(cache: Path, url: str = URL, **more: Any) -> transfer.TransferResult:
    return transfer.push(cache, RemoteFolder(url), **more)


def pull(folder: Path, url: str = URL) -> transfer.TransferResult:
    return transfer.pull(RemoteFolder(url), folder)


def other_cache(cache: Path, folder: Path) -> Path:
    """Copy a cache and change its manifest."""
    shutil.copytree(cache, folder)
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(document | {"num_skipped": 3}))
    reseal(folder)
    return folder


@pytest.mark.parametrize("folder", ["", "/caches/small"])
def test_pushed_and_pulled_it_is_the_same(
    hub: Hub, cache: Path, tmp_path: Path, folder: str
) -> None:
    count = num_shards(cache)
    assert push(cache, URL + folder).copied == count
    assert hub.count(COMMITS) == 1  # not one for each of the 24 files
    assert pull(tmp_path / "there", URL + folder).copied == count
    assert files(tmp_path / "there") == files(cache)
    sent = len(hub.asked)
    again = push(cache, URL + folder)
    assert (again.copied, again.unchanged, again.num_bytes) == (0, count, 0)
    assert {line.partition(" ")[0] for line in hub.asked[sent:]} == {"GET"}  # nothing is written


def test_words_in_a_card_that_is_there_stay(cache: Path, tmp_path: Path) -> None:
    """A card is edited on the far side; ours must not undo that, and yet be of this cache."""
    own = (cache / "README.md").read_text()
    edited = own.replace("license: unknown", "license: cc-by-4.0") + "\nMine.\n"
    there, pulled = tmp_path / "there", tmp_path / "pulled"
    shutil.copytree(cache, there)
    (there / "README.md").write_text(edited.replace("| `latents` | ", "| `latents` | 9"))
    push(there)
    push(cache)
    pull(pulled)
    assert (pulled / "README.md").read_text() == edited
    (pulled / "README.md").write_text(edited + "Here.\n")
    pull(pulled)
    assert (pulled / "README.md").read_text() == edited + "Here.\n"


def test_a_pull_asks_for_each_file_once(hub: Hub, cache: Path, tmp_path: Path) -> None:
    """The hub counts requests; 20,000 files must not take 80,000."""
    push(cache)
    before = len(hub.asked)
    pull(tmp_path / "there")
    asked = hub.asked[before:]
    resolved = [line for line in asked if "/resolve/" in line]
    assert len(resolved) == len(set(resolved)) == len(files(cache))
    listings = {line for line in asked if "/tree/" in line}
    assert len(listings) <= len({Path(name).parent for name in files(cache)})
    others = [line for line in asked if not re.search(r"/(resolve|tree|cdn)/", line)]
    assert len(others) <= 2, others


def test_an_interrupted_push_goes_on_and_is_no_cache_before(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_push, "SHARDS_A_COMMIT", 3)
    original, left = hub_push.Repository.commit, 2

    def commit(self: hub_push.Repository, *more: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(hub_push.Repository, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            push(cache)
    with pytest.raises(ShardError, match=r"manifest\.json: no such file there"):
        pull(tmp_path / "there")
    uploads = hub.count(UPLOADS)
    done = push(cache)
    assert done.unchanged == 6
    assert hub.count(UPLOADS) == uploads + done.copied  # a tar each
    pull(tmp_path / "there")
    assert files(tmp_path / "there") == files(cache)


def test_an_interrupted_pull_goes_on(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push(cache)
    hub.misbehave = lambda handler, asked, before: (
        "latents/000001.tar" in asked and handler.refuse(403) is None
    )
    with pytest.raises(ShardError, match=r"latents/000001\.tar: the server answers 403"):
        pull(tmp_path / "there")
    hub.misbehave = lambda *_: False
    assert not (tmp_path / "there" / "manifest.json").exists()
    assert pull(tmp_path / "there").unchanged >= 1
    assert files(tmp_path / "there") == files(cache)


def test_what_is_uploaded_and_not_committed_is_not_sent_again(hub: Hub, cache: Path) -> None:
    hub.misbehave = lambda handler, asked, before: (
        "/commit/" in asked and handler.refuse(403) is None
    )
    with pytest.raises(ShardError, match=r"hf://datasets/me/circles: the server answers 403"):
        push(cache)
    uploads = hub.count(UPLOADS)
    hub.misbehave = lambda *_: False
    assert push(cache).copied == num_shards(cache)
    assert hub.count(UPLOADS) == uploads


def test_another_complete_cache_is_not_overwritten_unless_asked(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(cache)
    other = other_cache(cache, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"circles: holds another complete cache; --overwrite"):
        push(other)
    monkeypatch.setattr(hub_push, "SHARDS_A_COMMIT", 1)
    (hub.commits[REPO][-1][1]).pop("latents/000001.json")
    (hub.commits[REPO][-1][1]).pop("text/000000.tar")
    before = len(hub.commits[REPO])
    assert push(other, overwrite=True).copied == 2
    # Until all is there, the repository holds no complete cache.
    complete = ["manifest.json" in held for _, held in hub.commits[REPO][before:]]
    assert complete == [False, False, True]
    pull(tmp_path / "there")
    assert manifest.load(tmp_path / "there").num_skipped == 3
    assert files(tmp_path / "there") == files(other)


def test_training_reads_the_commit_that_it_began_with(
    hub: Hub, cache: Path, tmp_path: Path
) -> None:
    push(cache)
    found = Cache(RemoteFiles(RemoteFolder(URL), tmp_path / "local", 1 << 30))
    held = hub.commits[REPO][-1][1]
    hub.add(REPO, dict.fromkeys(held, b"other"))
    assert same(everything(found), everything(Cache(cache)))


def test_training_streams_from_the_hub(
    hub: Hub, cache: Path, tmp_path: Path, train_config: TrainConfig
) -> None:
    push(cache)
    train(replace(train_config, cache=(URL,), local_cache_dir=tmp_path / "local"))
    assert list((tmp_path / "local").rglob("*.tar"))
    assert (train_config.output_dir / "config.json").is_file()


def drops(handler: Any, asked: str, before: int) -> bool:
    """Close the connection in the middle of each large file, twice."""
    if "/cdn/" not in asked or before >= 2:
        return False
    data = handler.hub.blobs[asked.rpartition("/")[2]]
    if match := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
        data = data[int(match[1]) :]
    handler.send_response(200 if match is None else 206)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])
    handler.close_connection = True
    return True


def overloaded(handler: Any, asked: str, before: int) -> bool:
    if before >= 1 or not re.match("GET .*(resolve|cdn|tree)", asked):
        return False
    handler.refuse(503)
    return True


@pytest.mark.parametrize("fault", [drops, overloaded], ids=lambda fault: fault.__name__)
def test_what_the_hub_does_for_a_while_is_survived(
    hub: Hub,
    cache: Path,
    tmp_path: Path,
    fault: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    push(cache)
    hub.misbehave = fault
    pull(tmp_path / "there")
    assert files(tmp_path / "there") == files(cache)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "RepoNotFound", "no such repository or revision on the hub, or it is private"),
        (401, "", r"the server answers 401 .*; check the credentials"),
        (403, "", r"the server answers 403 Forbidden.*; check the credentials"),
        (403, "GatedRepo", "gated: accept its terms on its hub page"),
        (404, "RevisionNotFound", "no such repository or revision on the hub"),
        (404, "EntryNotFound", "no such file there"),
    ],
)
def test_what_cannot_get_better_is_asked_for_once(
    hub: Hub, cache: Path, tmp_path: Path, status: int, code: str, reason: str
) -> None:
    push(cache)
    before = len(hub.asked)
    hub.misbehave = lambda handler, *_: handler.refuse(status, code) is None
    with pytest.raises(ShardError, match=rf"^{URL}/manifest\.json: {reason}"):
        pull(tmp_path / "there")
    assert len(hub.asked) == before + 1


def test_an_overloaded_hub_is_asked_again(hub: Hub, cache: Path, tmp_path: Path) -> None:
    push(cache)
    before = len(hub.asked)
    hub.misbehave = lambda handler, *_: handler.refuse(429) is None
    with pytest.raises(ShardError, match=rf"^{URL}/manifest\.json: .* \(tried 6 times\)"):
        pull(tmp_path / "there")
    assert len(hub.asked) == before + retry.ATTEMPTS


def test_a_repository_is_made_private_and_written_at_the_revision_that_is_named(
    hub: Hub, cache: Path
) -> None:
    made: list[Any] = []

    def look(handler: Any, asked: str, before: int) -> bool:
        if asked.startswith("POST /api/repos/create"):
            made.append(json.loads(handler.body))
        return False

    hub.misbehave = look
    push(cache)
    (asked,) = made
    assert asked.get("private") is True or asked.get("visibility") == "private"
    hub.misbehave = lambda handler, asked, before: (
        "/commit/" in asked and handler.refuse(403) is None
    )
    other = hub.commits[REPO][0][0]  # the hub knows no branches, but any commit
    with pytest.raises(ShardError, match="the server answers 403"):
        push(cache, f"hf://{REPO}@{other}")
    assert hub.asked[-1] == f"POST /api/{REPO}/commit/{other}"


def test_a_repository_that_goes_away_is_no_missing_file(hub: Hub, cache: Path) -> None:
    push(cache)
    remote = RemoteFolder(URL)
    assert remote.size("manifest.json") == (cache / "manifest.json").stat().st_size
    hub.misbehave = lambda handler, *_: handler.refuse(401, "RepoNotFound") is None
    with pytest.raises(ShardError, match="no such repository or revision on the hub"):
        remote.size("latents/000000.tar")


def test_what_fsspec_says_of_a_repository_that_is_not_there_is_no_missing_file(hub: Hub) -> None:
    """It raises the same error for both; what it was raised from tells."""
    missing, gone = FileNotFoundError("a path"), FileNotFoundError("a path")
    hub.misbehave = lambda handler, *_: handler.refuse(401, "RepoNotFound") is None
    with pytest.raises(RepositoryNotFoundError) as raised:
        HfApi().repo_info(REPO.removeprefix("datasets/"), repo_type="dataset")
    gone.__cause__ = raised.value
    assert retry.is_missing(missing)
    assert not retry.is_missing(gone)


def test_a_damaged_cache_is_not_pushed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    path = copy / "text" / "000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardError, match=r"000001\.tar: damaged or changed"):
        push(copy)
    assert "manifest.json" not in hub.files(REPO)


@pytest.mark.parametrize("address", ["hf://datasets/me", "hf://me", "hf://datasets/a b/c"])
def test_an_address_that_is_no_repository_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not a folder on the hub: hf://datasets/OWNER/NAME"):
        RemoteFolder(address)


def test_without_leave_to_make_the_repository_the_reason_is_given(hub: Hub, cache: Path) -> None:
    hub.misbehave = lambda handler, asked, _: (
        asked.startswith("POST /api/repos/create") and handler.refuse(403) is None
    )
    with pytest.raises(ShardError, match=rf"^{URL}: the server answers 403 .*the credentials$"):
        push(cache)
    assert hub.count("POST /api/repos/create") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "held", "number"),
    [("push", UPLOADS, signal.SIGTERM), ("pull", "GET /cdn/", signal.SIGKILL)],
    ids=["push", "pull"],
)
def test_a_killed_transfer_goes_on(
    hub: Hub, cache: Path, tmp_path: Path, what: str, held: str, number: signal.Signals
) -> None:
    there = tmp_path / "there"
    if what == "pull":
        push(cache)
    halfway, over = threading.Event(), threading.Event()

    def hangs(handler: Any, asked: str, before: int) -> bool:
        if re.match(held, asked) and hub.count(held) > 6:
            halfway.set()
            over.wait(60)
            handler.close_connection = True
            return True
        return False

    hub.misbehave = hangs
    arguments = (cache, URL) if what == "push" else (URL, there)
    process = subprocess.Popen(
        [sys.executable, "-m", "shards", what, *map(str, arguments)],
        env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        stderr=subprocess.DEVNULL,
    )
    assert halfway.wait(60)
    process.send_signal(number)
    assert process.wait(60) == -number
    over.set()
    hub.misbehave = lambda *_: False
    assert not (there / "manifest.json").exists()
    assert "manifest.json" not in hub.files(REPO) or what == "pull"
    before = hub.count(held)
    push(cache) if what == "push" else pull(there)
    assert 0 < hub.count(held) - before < num_shards(cache)  # not all of them again
    pull(tmp_path / "again")
    assert files(tmp_path / "again") == files(cache)


def test_commands(hub: Hub, cache: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    outcome = command("shards", "push", cache, URL)
    assert outcome.exit_code == 0, outcome.output
    assert "complete, 11 shards copied" in outcome.output
    outcome = command("shards", "pull", URL, tmp_path / "there")
    assert "complete, 11 shards copied" in outcome.output
    assert "latents/000001.tar" in command("shards", "info", URL, "--shards").output
