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
from shards.format.manifest import MANIFEST, PREVIOUS, Manifest
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.location import LocalFiles, file_sha256
from shards.remote.folder import RemoteFolder

AT_A_TIME = 4
ABANDONED_AFTER_S = 3600
READ_ONLY = ("http", "https")


@dataclass(frozen=True)
class ShardFiles:
    """A shard's two files as a manifest lists them, relative to the cache."""

    tar: str
    tar_bytes: int
    tar_sha256: str
    sidecar: str
    sidecar_sha256: str


@dataclass(frozen=True)
class Copied:
    """What a transfer came to: shards that were copied and that were there already, and bytes."""

    copied: int
    kept: int
    num_bytes: int


def pull(remote: RemoteFolder, cache: Path, *, overwrite: bool = False) -> Copied:
    """Bring a folder of this machine to what a remote cache is.

    Every file that is here is read and checked, so that a damaged one is replaced. An interrupted
    transfer goes on where it was. Shards that the remote cache does not list stay.

    Args:
        remote: a complete cache.
        cache: made if missing.
        overwrite: whether a complete cache that is another may be changed.

    Raises:
        ShardError: the remote cache is incomplete, or a file cannot be had as it should be.
        ConfigError: the folder holds something else.
        OSError: it cannot be written.
    """
    present = [path.name for path in cache.iterdir()] if cache.is_dir() else []
    if present and MANIFEST not in present and not {"text", "latents"} & set(present):
        raise ConfigError(f"{cache}: holds {min(present)} and is no cache; give another folder.")
    cache.mkdir(parents=True, exist_ok=True)
    data = remote.read(MANIFEST)
    found = manifest.from_json(data, f"{remote}/{MANIFEST}")
    if (cache / MANIFEST).is_file() and json_files.read_file(cache / MANIFEST) != data:
        _require(overwrite, cache)
        (cache / MANIFEST).replace(cache / PREVIOUS)

    def bring(files: ShardFiles) -> tuple[int, bool]:
        tar, card = cache / files.tar, cache / files.sidecar
        has_tar = _is(tar, files.tar_sha256, files.tar_bytes)
        if has_tar and _is(card, files.sidecar_sha256):
            return files.tar_bytes, False
        card.unlink(missing_ok=True)  # until both are new it vouches for nothing
        if not has_tar:
            remote.fetch(files.tar, tar, size=files.tar_bytes, sha256=files.tar_sha256)
        remote.fetch(files.sidecar, card, size=None, sha256=files.sidecar_sha256)
        return files.tar_bytes, True

    done = _for_each("pull", remote, found, bring)
    with contextlib.suppress(ShardError):  # not every copy of a cache has it
        remote.fetch(RUN, cache / RUN, size=None, sha256=None)
    with atomic_file(cache / MANIFEST) as file:
        file.write(data)
    (cache / PREVIOUS).unlink(missing_ok=True)
    for part in cache.rglob("*.part"):  # of transfers that were killed
        if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
            part.unlink()
    return done


def push(cache: Path, remote: RemoteFolder, *, overwrite: bool = False) -> Copied:
    """Bring a remote folder to what a cache of this machine is.

    Every file is read and checked before it is sent. What is there counts as the same where its
    sidecar is and its size is. An interrupted transfer goes on where it was.

    Args:
        cache: a complete cache.
        remote: where it goes.
        overwrite: whether a complete cache that is another may be changed.

    Raises:
        ShardError: the cache is incomplete or damaged, or a file cannot be sent.
        ConfigError: the remote folder cannot be written, or holds another cache.
    """
    if remote.scheme in READ_ONLY:
        raise ConfigError(
            f"{remote}: {remote.scheme}:// can only be read; give s3://, gs:// or hf://."
        )
    files = LocalFiles(cache)
    found = files.manifest()
    files.check_present(found, [folder for folder, _ in found.products()])
    data = json_files.read_file(cache / MANIFEST)
    there = remote.read(MANIFEST) if remote.size(MANIFEST) is not None else None
    if there is not None and there != data:
        _require(overwrite, remote)
        remote.remove(MANIFEST)

    def send(one: ShardFiles) -> tuple[int, bool]:
        for name, sha256 in ((one.tar, one.tar_sha256), (one.sidecar, one.sidecar_sha256)):
            if not _is(cache / name, sha256):
                raise ShardError(f"{cache / name}: damaged or changed; run shards verify")
        if remote.size(one.tar) == one.tar_bytes and _has(remote, one):
            return one.tar_bytes, False
        remote.remove(one.sidecar)
        remote.put(cache / one.tar, one.tar)
        remote.put(cache / one.sidecar, one.sidecar)
        return one.tar_bytes, True

    done = _for_each("push", remote, found, send)
    for name in (RUN, MANIFEST):
        if (cache / name).is_file() and (name != MANIFEST or there != data or done.copied):
            remote.put(cache / name, name)
    return done


def _has(remote: RemoteFolder, files: ShardFiles) -> bool:
    """Tell whether a shard was sent before: its sidecar is sent after its tar."""
    if remote.size(files.sidecar) is None:
        return False
    return hashlib.sha256(remote.read(files.sidecar)).hexdigest() == files.sidecar_sha256


def _require(overwrite: bool, where: object) -> None:
    if not overwrite:
        raise ConfigError(
            f"{where}: holds another complete cache; --overwrite replaces in it what differs."
        )


def _shards(found: Manifest) -> list[ShardFiles]:
    """Return all shards that a manifest lists."""
    return [
        ShardFiles(
            tar_path(Path(folder), shard).as_posix(),
            product.shard_bytes[shard],
            product.shard_sha256[shard],
            sidecar_path(Path(folder), shard).as_posix(),
            product.sidecar_sha256[shard],
        )
        for folder, product in found.products()
        for shard in range(product.num_shards)
    ]


def _for_each(
    label: str,
    remote: RemoteFolder,
    found: Manifest,
    work: Callable[[ShardFiles], tuple[int, bool]],
) -> Copied:
    """Treat all shards, some at a time; `work` returns a shard's bytes and whether it copied it."""
    shards = _shards(found)
    counts = {True: 0, False: 0}
    num_bytes = 0
    with (
        ThreadPoolExecutor(AT_A_TIME) as pool,
        tqdm(
            total=sum(one.tar_bytes for one in shards),
            desc=label,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        try:
            for size, copied in prefetch(pool, work, shards, lead=AT_A_TIME):
                counts[copied] += 1
                num_bytes += size if copied else 0
                bar.update(size)
        except BaseException:
            remote.give_up()  # else the other threads try on for minutes
            raise
    return Copied(counts[True], counts[False], num_bytes)


def _is(path: Path, sha256: str, size: int | None = None) -> bool:
    """Tell whether a file is there with these bytes."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return file_sha256(path) == sha256
