"""pull, push and training against an S3-protocol server on loopback, with the real client."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from common.errors import ConfigError, ShardError
from shards import verify
from shards.format import manifest
from shards.reading.cache import Cache
from shards.remote import retry, transfer
from shards.remote.folder import RemoteFolder
from shards.remote.streaming import RemoteFiles
from tests.conftest import Outcome, reseal
from train.config import TrainConfig
from train.run import train


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh folder in an S3 bucket."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    server = s3fs.S3FileSystem(skip_instance_cache=True)
    if server.exists("caches"):
        server.rm("caches", recursive=True)
    server.mkdir("caches")
    return "s3://caches/circles"


def files(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of a cache's files, without those that are for writers alone."""
    writers = ("plan.safetensors", "hashes.npy", "hashes.npy.lock")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in writers
    }


def num_shards(cache: Path) -> int:
    return verify.num_shards(manifest.load(cache))


def test_pushed_and_pulled_it_is_the_same(cache: Path, bucket: str, tmp_path: Path) -> None:
    count = num_shards(cache)
    assert transfer.push(cache, RemoteFolder(bucket)).copied == count
    assert transfer.pull(RemoteFolder(bucket), tmp_path / "there").copied == count
    assert files(tmp_path / "there") == files(cache)
    again = transfer.push(cache, RemoteFolder(bucket))
    assert (again.copied, again.unchanged, again.num_bytes) == (0, count, 0)
    again = transfer.pull(RemoteFolder(bucket), tmp_path / "there")
    assert (again.copied, again.unchanged) == (0, count)


def test_words_in_a_card_that_is_there_stay(cache: Path, bucket: str, tmp_path: Path) -> None:
    """A card is edited on the far side; ours must not undo that, and yet be of this cache."""
    own = (cache / "README.md").read_text()
    edited = own.replace("license: unknown", "license: cc-by-4.0") + "\nMine.\n"
    there, pulled = tmp_path / "there", tmp_path / "pulled"
    shutil.copytree(cache, there)
    (there / "README.md").write_text(edited.replace("| `latents` | ", "| `latents` | 9"))
    transfer.push(there, RemoteFolder(bucket))
    transfer.push(cache, RemoteFolder(bucket))
    transfer.pull(RemoteFolder(bucket), pulled)
    assert (pulled / "README.md").read_text() == edited
    (pulled / "README.md").write_text(edited + "Here.\n")
    transfer.pull(RemoteFolder(bucket), pulled)
    assert (pulled / "README.md").read_text() == edited + "Here.\n"


def test_pull_replaces_what_is_damaged_and_nothing_else(
    cache: Path, bucket: str, tmp_path: Path
) -> None:
    transfer.push(cache, RemoteFolder(bucket))
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    path = copy / "latents" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (copy / "text" / "000002.json").unlink()
    assert transfer.pull(RemoteFolder(bucket), copy).copied == 2
    assert files(copy) == files(cache)


def test_an_interrupted_pull_goes_on(
    cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.push(cache, RemoteFolder(bucket))
    # One more than there are shards, of two files each: whatever the threads' order is, one of them
    # has both.
    original, left = RemoteFolder.fetch, len(list(cache.rglob("*.tar"))) + 1

    def fetch(self: RemoteFolder, name: str, target: Path, **more: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(self, name, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "fetch", fetch)
        with pytest.raises(KeyboardInterrupt):
            transfer.pull(RemoteFolder(bucket), tmp_path / "there")
    with pytest.raises(ShardError, match="incomplete, manifest"):
        manifest.load(tmp_path / "there")
    done = transfer.pull(RemoteFolder(bucket), tmp_path / "there")
    assert done.unchanged >= 1
    assert files(tmp_path / "there") == files(cache)


def test_an_interrupted_push_goes_on_and_is_no_cache_before(
    cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = RemoteFolder.put, 7

    def put(self: RemoteFolder, path: Path, name: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        original(self, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "put", put)
        with pytest.raises(KeyboardInterrupt):
            transfer.push(cache, RemoteFolder(bucket))
    with pytest.raises(ShardError, match=r"manifest\.json: no such file there"):
        transfer.pull(RemoteFolder(bucket), tmp_path / "there")
    assert transfer.push(cache, RemoteFolder(bucket)).unchanged >= 2
    transfer.pull(RemoteFolder(bucket), tmp_path / "there")
    assert files(tmp_path / "there") == files(cache)


@pytest.mark.slow
def test_another_complete_cache_is_not_overwritten_unless_asked(
    cache: Path, bucket: str, tmp_path: Path
) -> None:
    transfer.push(cache, RemoteFolder(bucket))
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    document = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(document | {"num_skipped": 3}))
    reseal(other)
    with pytest.raises(ConfigError, match=r"circles: holds another complete cache; --overwrite"):
        transfer.push(other, RemoteFolder(bucket))
    with pytest.raises(ConfigError, match=r"other: holds another complete cache; --overwrite"):
        transfer.pull(RemoteFolder(bucket), other)
    assert transfer.push(other, RemoteFolder(bucket), overwrite=True).copied == 0
    transfer.pull(RemoteFolder(bucket), cache_copy := tmp_path / "there")
    assert manifest.load(cache_copy).num_skipped == 3


def test_push_makes_good_what_is_lost_there(cache: Path, bucket: str, tmp_path: Path) -> None:
    folder = RemoteFolder(bucket)
    transfer.push(cache, folder)
    folder.remove("latents/000001.json")
    folder.remove("text/000000.tar")
    assert transfer.push(cache, folder).copied == 2
    transfer.pull(folder, tmp_path / "there")
    assert files(tmp_path / "there") == files(cache)


def test_a_damaged_cache_is_not_pushed(cache: Path, bucket: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    path = copy / "text" / "000001.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardError, match=r"000001\.tar: damaged or changed"):
        transfer.push(copy, RemoteFolder(bucket))


def test_what_is_no_cache_is_not_pulled_into(cache: Path, bucket: str, tmp_path: Path) -> None:
    transfer.push(cache, RemoteFolder(bucket))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex and is no cache"):
        transfer.pull(RemoteFolder(bucket), tmp_path)


def test_training_streams_from_s3(
    cache: Path, bucket: str, tmp_path: Path, train_config: TrainConfig
) -> None:
    transfer.push(cache, RemoteFolder(bucket))
    train(replace(train_config, cache=(bucket,), local_cache_dir=tmp_path / "local"))
    assert list((tmp_path / "local").rglob("*.tar"))
    assert (train_config.output_dir / "config.json").is_file()


def test_without_credentials_or_bucket_the_reason_is_given(
    cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ShardError, match=r"^s3://nowhere/x/manifest\.json: "):
        Cache(RemoteFiles(RemoteFolder("s3://nowhere/x"), tmp_path, 1 << 30))


@pytest.mark.slow
def test_commands(
    cache: Path, bucket: str, base: Path, tmp_path: Path, command: Callable[..., Outcome]
) -> None:
    outcome = command("shards", "push", cache, bucket)
    assert outcome.exit_code == 0
    assert "complete, 11 shards copied" in outcome.output
    outcome = command("shards", "pull", bucket, tmp_path / "there")
    assert "complete, 11 shards copied" in outcome.output
    assert command("shards", "verify", tmp_path / "there").exit_code == 0
    outcome = command("shards", "info", bucket, "--shards")
    assert "latents/000001.tar" in outcome.output
    listed = json.loads(command("shards", "info", bucket, "--shards", "--json").output)
    assert len(listed["shards"]) == 11
    for arguments in (("verify", bucket), ("pull", bucket, bucket), ("push", bucket, bucket)):
        outcome = command("shards", *arguments)
        assert outcome.exit_code == 2
        assert f"this needs a folder of this machine: python -m shards pull {bucket}" in (
            outcome.output
        )
    outcome = command("shards", "push", cache, "http://127.0.0.1/x")
    assert outcome.exit_code == 2
    assert "http:// can only be read" in outcome.output
    sheet = tmp_path / "sheet.png"
    outcome = command(
        "shards", "preview", bucket, "--pretrained-model-name-or-path", base, "--num-samples", 3,
        "--output", sheet, "--local-cache-dir", tmp_path / "local",
    )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    assert sheet.is_file()
