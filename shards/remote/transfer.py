"""Copying a cache from or to a URL: checked, only what differs, the manifest last."""

import contextlib
import hashlib
from pathlib import Path

from common.atomic_files import atomic_file
from common.errors import ConfigError, ShardError
from common.provenance import RUN
from shards.format import json_files, manifest
from shards.format.expected_cache import PLAN
from shards.format.manifest import MANIFEST, PREVIOUS, SAMPLES, Manifest
from shards.format.published import dataset_card
from shards.format.published.dataset_card import CARD
from shards.reading.location import LocalFiles
from shards.remote import hub_push
from shards.remote.card import card_to_send
from shards.remote.folder import RemoteFolder, remove_abandoned
from shards.remote.index_file import check_index, pull_index, push_index
from shards.remote.shard_files import (
    ShardFiles,
    TransferResult,
    for_each_shard,
    matches,
    require_overwrite,
)

READ_ONLY = ("http", "https")


def pull(remote: RemoteFolder, cache: Path, *, overwrite: bool = False) -> TransferResult:
    """Make a folder of this machine equal to a remote cache.

    Every file that is here is read and checked, so that a damaged one is replaced. An interrupted
    transfer continues where it was. Shards that the remote cache does not list stay.

    Args:
        remote: a complete cache.
        cache: made if missing.
        overwrite: whether another cache in the folder, complete or begun by precompute, may be
            changed.

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
    if not is_same:
        if (cache / MANIFEST).is_file():
            require_overwrite(overwrite, cache)
            (cache / MANIFEST).replace(cache / PREVIOUS)
        elif (cache / PLAN).is_file():  # what an interrupted pull left has none
            require_overwrite(overwrite, cache, "a cache that precompute has not finished")
        (cache / PLAN).unlink(missing_ok=True)  # of another cache than the one that arrives
    pull_index(remote, cache, remote_manifest)
    result = for_each_shard(
        "pull",
        remote_manifest,
        lambda files: _pull_shard(remote, cache, files),
        give_up=remote.give_up,
    )
    with contextlib.suppress(ShardError):  # not every copy of a cache has it
        remote.fetch(RUN, cache / RUN, size=None, sha256=None)
    _pull_card(remote, cache, remote_manifest)
    with atomic_file(cache / MANIFEST) as file:
        file.write(data)
    (cache / PREVIOUS).unlink(missing_ok=True)
    remove_abandoned(cache)
    return result


def _pull_card(remote: RemoteFolder, cache: Path, own_manifest: Manifest) -> None:
    """Fetch the data set card, unless one is here; bring it up to date if one is now."""
    if not (cache / CARD).is_file():
        with contextlib.suppress(ShardError):  # a cache of a former version has none
            remote.fetch(CARD, cache / CARD, size=None, sha256=None)
    if (cache / CARD).is_file():
        dataset_card.write(cache, own_manifest)


def _pull_shard(remote: RemoteFolder, cache: Path, files: ShardFiles) -> bool:
    """Fetch a shard unless it is here; return whether it was fetched."""
    tar, sidecar = cache / files.tar, cache / files.sidecar
    has_tar = matches(tar, files.tar_sha256, files.tar_bytes)
    if has_tar and matches(sidecar, files.sidecar_sha256):
        return False
    sidecar.unlink(missing_ok=True)  # it must not vouch for a tar that is being replaced
    if not has_tar:
        remote.fetch(files.tar, tar, size=files.tar_bytes, sha256=files.tar_sha256)
    remote.fetch(files.sidecar, sidecar, size=None, sha256=files.sidecar_sha256)
    return True


def push(cache: Path, remote: RemoteFolder, *, overwrite: bool = False) -> TransferResult:
    """Make a remote folder equal to a cache of this machine.

    Every file is read and checked before it is sent. A remote shard counts as equal if its sidecar
    and the size of its tar are, on the hub if both digests are. An interrupted transfer continues
    where it was.

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
    check_index(cache, own_manifest)
    if remote.is_repository:
        return hub_push.push(cache, remote, own_manifest, overwrite=overwrite)
    data = json_files.read_file(cache / MANIFEST)
    remote_data = remote.read(MANIFEST) if remote.size(MANIFEST) is not None else None
    if remote_data is not None and remote_data != data:
        require_overwrite(overwrite, remote)
        remote.remove(MANIFEST)
        remote.remove(SAMPLES)
    result = for_each_shard(
        "push",
        own_manifest,
        lambda files: _push_shard(cache, remote, files),
        give_up=remote.give_up,
    )
    if (cache / RUN).is_file():
        remote.put(cache / RUN, RUN)
    with card_to_send(cache, remote, own_manifest) as card:
        if card:
            remote.put(card, CARD)
    push_index(cache, remote, own_manifest, was_complete=remote_data == data)
    if remote_data != data or result.copied:
        remote.put(cache / MANIFEST, MANIFEST)
    return result


def _push_shard(cache: Path, remote: RemoteFolder, files: ShardFiles) -> bool:
    """Send a shard unless it is there; return whether it was sent."""
    files.check(cache)
    if remote.size(files.tar) == files.tar_bytes and _was_sent(remote, files):
        return False
    remote.remove(files.sidecar)
    for name in (files.tar, files.sidecar):
        remote.put(cache / name, name)
    return True


def _was_sent(remote: RemoteFolder, files: ShardFiles) -> bool:
    """Tell whether a shard was sent before: its sidecar is sent after its tar."""
    if remote.size(files.sidecar) is None:
        return False
    return hashlib.sha256(remote.read(files.sidecar)).hexdigest() == files.sidecar_sha256
