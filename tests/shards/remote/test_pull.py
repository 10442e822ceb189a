"""What a pull leaves alone, and what stands in the folder while it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, ShardError
from shards import verify
from shards.format import manifest
from shards.remote import transfer
from shards.remote.folder import RemoteFolder
from tests.conftest import reseal, write_manifest
from tests.shards.remote.conftest import Server

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.usefixtures("patience")


def former(cache: Path, folder: Path) -> Path:
    """Copy a cache as a former version made it, without an index of samples."""
    shutil.copytree(cache, folder)
    (folder / "samples.parquet").unlink()
    document = json.loads((folder / "manifest.json").read_text())
    del document["samples"]
    write_manifest(folder, document)
    return folder


def damage(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_a_cache_that_precompute_began_is_not_overwritten_unless_asked(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    begun = Path(shutil.copytree(cache, tmp_path / "begun"))
    (begun / "manifest.json").unlink()
    shutil.rmtree(begun / "conditioning")
    damage(begun / "latents" / "000001.tar")  # in place of what was encoded from other pictures
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    remote = RemoteFolder(serve(cache).url)
    with pytest.raises(
        ConfigError,
        match=r"begun: holds a cache that precompute has not finished; --overwrite replaces",
    ):
        transfer.pull(remote, begun)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before
    transfer.pull(remote, begun, overwrite=True)
    assert manifest.load(begun) == manifest.load(cache)


def test_what_is_being_pulled_is_no_cache_and_no_plan_of_another(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    document = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(document | {"num_skipped": 3}))
    reseal(other)
    for name in ("latents/000001", "text/000000"):
        damage(other / f"{name}.tar")
    server = serve(cache)
    there: list[str] = []

    def look(handler: Any, path: str, before: int, data: bytes) -> bool:
        if path.endswith(".tar"):
            names = ("manifest.json", "plan.safetensors", path.replace(".tar", ".json"))
            there.extend(name for name in names if (other / name).exists())
        return False

    server.misbehave = look
    assert transfer.pull(RemoteFolder(server.url), other, overwrite=True).copied == 2
    assert sum(path.endswith(".tar") for path in server.asked) == 2
    assert there == []
    assert manifest.load(other) == manifest.load(cache)
    assert not (other / "manifest.previous.json").exists()


def test_no_index_of_another_cache_stays(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    pulled = Path(shutil.copytree(cache, tmp_path / "pulled"))
    old = former(cache, tmp_path / "former")
    transfer.pull(RemoteFolder(serve(old).url), pulled, overwrite=True)
    assert not (pulled / "samples.parquet").exists()
    transfer.pull(RemoteFolder(serve(cache).url), pulled, overwrite=True)
    assert (pulled / "samples.parquet").read_bytes() == (cache / "samples.parquet").read_bytes()


def test_a_copy_without_its_index_is_pulled_and_told(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "copied"))
    (copied / "samples.parquet").unlink()
    transfer.pull(RemoteFolder(serve(copied).url), tmp_path / "pulled")
    (fault,) = [fault for _, faults in verify.faults(tmp_path / "pulled") for fault in faults]
    assert "samples.parquet: missing, though" in fault
    (copied / "samples.parquet").write_bytes(b"other")
    with pytest.raises(ShardError, match=r"samples\.parquet"):
        transfer.pull(RemoteFolder(serve(copied).url), tmp_path / "again")


def test_an_index_that_is_not_the_manifests_is_not_sent(cache: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(cache, tmp_path / "copied"))
    (copied / "samples.parquet").write_bytes(b"other")
    with pytest.raises(ShardError, match=r"samples\.parquet: missing, damaged or changed; python"):
        transfer.push(copied, RemoteFolder("s3://bucket/never-asked"))
