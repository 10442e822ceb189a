"""Copying a cache from or to a URL: checked, only what differs, the manifest last."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.atomic_files import atomic_file
from common.errors import ConfigError, ShardError
from common.prefetch import prefetch
from common.provenance import RUN
from shards.format import json_files, manifest
from shards.format.expected_cache import PLAN
from shards.format.manifest import MANIFEST, PREVIOUS, Manifest
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.location import LocalFiles, file_sha256
from shards.remote.folder import RemoteFolder

SHARDS_AT_A_TIME = 4
ABANDONED_AFTER_S = 3600
READ_ONLY = ("http", "https")


@dataclass(frozen=True)
class ShardFiles:
    """A shard's two files as a manifest lists them; paths are relative to the cache."""

    tar: str
    tar_bytes: int
    tar_sha256: str
    sidecar: str
    sidecar_sha256: str


@dataclass(frozen=True)
class TransferResult:
    """What a transfer did.

    Attributes:
        copied: number of shards that were copied.
        unchanged: number of shards that were there already.
        num_bytes: size of the copied tars.
    """

    copied: int
    unchanged: int
    num_bytes: int


def pull(remote: RemoteFolder, cache: Path, *, overwrite: bool = False) -> TransferResult:
    """Make a folder of this machine equal to a remote cache.

    Every file that is here is read and checked, so that a damaged one is replaced. An interrupted
    transfer continues where it was. Shards that the remote cache does not list stay.

    Args:
        remote: a complete cache.
        cache: made if missing.
        overwrite: whether another complete cache in the folder may be changed.

    Raises:
        ShardError: the remote cache is incomplete, or a file cannot be fetched as it should be.
        ConfigError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    present = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    if present and MANIFEST not in present and not {"text", "latents"} & set(present):
        raise ConfigError(f"{cache}: holds {min(present)} and is no cache; give another folder.")
    cache.mkdir(parents=True, exist_ok=True)
    data = remote.read(MANIFEST)
    remote_manifest = manifest.from_json(data, f"{remote}/{MANIFEST}")
    is_same = (cache / MANIFEST).is_file() and json_files.read_file(cache / MANIFEST) == data
    if not is_same:  # a plan that is here is of another cache
        (cache / PLAN).unlink(missing_ok=True)
    if (cache / MANIFEST).is_file() and not is_same:
        _require(overwrite, cache)
        (cache / MANIFEST).replace(cache / PREVIOUS)
    result = _for_each_shard(
        "pull", remote, remote_manifest, lambda files: _pull_shard(remote, cache, files)
    )
    with contextlib.suppress(ShardError):  # not every copy of a cache has it
        remote.fetch(RUN, cache / RUN, size=None, sha256=None)
    with atomic_file(cache / MANIFEST) as file:
        file.write(data)
    (cache / PREVIOUS).unlink(missing_ok=True)
    for part in cache.rglob("*.part"):  # of transfers that were killed
        if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
            part.unlink()
    return result


def _pull_shard(remote: RemoteFolder, cache: Path, files: ShardFiles) -> bool:
    """Fetch a shard unless it is here; return whether it was fetched."""
    tar, sidecar = cache / files.tar, cache / files.sidecar
    has_tar = _matches(tar, files.tar_sha256, files.tar_bytes)
    if has_tar and _matches(sidecar, files.sidecar_sha256):
        return False
    sidecar.unlink(missing_ok=True)  # it must not vouch for a tar that is being replaced
    if not has_tar:
        remote.fetch(files.tar, tar, size=files.tar_bytes, sha256=files.tar_sha256)
    remote.fetch(files.sidecar, sidecar, size=None, sha256=files.sidecar_sha256)
    return True


def push(cache: Path, remote: RemoteFolder, *, overwrite: bool = False) -> TransferResult:
    """Make a remote folder equal to a cache of this machine.

    Every file is read and checked before it is sent. A remote shard counts as equal if its sidecar
    and the size of its tar are. An interrupted transfer continues where it was.

    Args:
        cache: a complete cache.
        remote: the folder to write.
        overwrite: whether another complete cache in the remote folder may be changed.

    Raises:
        ShardError: the cache is incomplete or damaged, or a file cannot be sent.
        ConfigError: the remote folder cannot be written, or holds another cache.
    """
    if remote.scheme in READ_ONLY:
        raise ConfigError(
            f"{remote}: {remote.scheme}:// can only be read; give s3://, gs:// or hf://."
        )
    files = LocalFiles(cache)
    own_manifest = files.manifest()
    files.check_present(own_manifest, [folder for folder, _ in own_manifest.products()])
    data = json_files.read_file(cache / MANIFEST)
    remote_data = remote.read(MANIFEST) if remote.size(MANIFEST) is not None else None
    if remote_data is not None and remote_data != data:
        _require(overwrite, remote)
        remote.remove(MANIFEST)
    result = _for_each_shard(
        "push", remote, own_manifest, lambda files: _push_shard(cache, remote, files)
    )
    if (cache / RUN).is_file():
        remote.put(cache / RUN, RUN)
    if remote_data != data or result.copied:
        remote.put(cache / MANIFEST, MANIFEST)
    return result


def _push_shard(cache: Path, remote: RemoteFolder, files: ShardFiles) -> bool:
    """Send a shard unless it is there; return whether it was sent."""
    own = ((files.tar, files.tar_sha256), (files.sidecar, files.sidecar_sha256))
    for name, sha256 in own:
        if not _matches(cache / name, sha256):
            raise ShardError(f"{cache / name}: damaged or changed; run shards verify")
    if remote.size(files.tar) == files.tar_bytes and _was_sent(remote, files):
        return False
    remote.remove(files.sidecar)
    for name, _ in own:
        remote.put(cache / name, name)
    return True


def _was_sent(remote: RemoteFolder, files: ShardFiles) -> bool:
    """Tell whether a shard was sent before: its sidecar is sent after its tar."""
    if remote.size(files.sidecar) is None:
        return False
    return hashlib.sha256(remote.read(files.sidecar)).hexdigest() == files.sidecar_sha256


def _require(overwrite: bool, where: object) -> None:
    if not overwrite:
        raise ConfigError(
            f"{where}: holds another complete cache; --overwrite replaces in it what differs."
        )


def _all_shards(manifest: Manifest) -> list[ShardFiles]:
    return [
        ShardFiles(
            tar_path(Path(folder), shard).as_posix(),
            product.shard_bytes[shard],
            product.shard_sha256[shard],
            sidecar_path(Path(folder), shard).as_posix(),
            product.sidecar_sha256[shard],
        )
        for folder, product in manifest.products()
        for shard in range(product.num_shards)
    ]


def _for_each_shard(
    label: str, remote: RemoteFolder, manifest: Manifest, copy: Callable[[ShardFiles], bool]
) -> TransferResult:
    """Call `copy`, which returns whether it copied, for all shards, some at a time."""
    shards = _all_shards(manifest)
    num_copied, num_bytes = 0, 0
    total = sum(files.tar_bytes for files in shards)
    with (
        ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool,
        tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            results = prefetch(pool, copy, shards, lead=SHARDS_AT_A_TIME)
            for files, copied in zip(shards, results, strict=True):
                num_copied += copied
                num_bytes += files.tar_bytes if copied else 0
                bar.update(files.tar_bytes)
        except BaseException:
            remote.give_up()  # otherwise the other threads try again for minutes
            raise
    return TransferResult(num_copied, len(shards) - num_copied, num_bytes)


def _matches(path: Path, sha256: str, size: int | None = None) -> bool:
    """Tell whether a file is there with these bytes."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return file_sha256(path) == sha256
