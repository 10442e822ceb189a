"""The index of samples on its way from and to a remote cache."""

from pathlib import Path

from common.errors import ShardError
from shards.format.manifest import SAMPLES, Manifest
from shards.format.published import samples
from shards.remote.folder import RemoteFolder


def pull_index(remote: RemoteFolder, cache: Path, manifest: Manifest) -> None:
    """Make a cache's index the one that a remote cache has, or remove it.

    A copy without the index that its manifest lists, which who copies by hand may leave behind, is
    a cache all the same; `verify` says how to get one.

    Args:
        remote: the remote cache.
        cache: its copy on this machine.
        manifest: the remote one.

    Raises:
        ShardError: it cannot be fetched as it should be.
    """
    listed = manifest.samples
    if listed and samples.is_there(cache, listed):
        return
    (cache / SAMPLES).unlink(missing_ok=True)  # of another cache than the one that arrives
    if listed:
        try:
            size, sha256 = listed.num_bytes, listed.sha256
            remote.fetch(SAMPLES, cache / SAMPLES, size=size, sha256=sha256)
        except ShardError:
            if remote.size(SAMPLES) is not None:
                raise


def check_index(cache: Path, manifest: Manifest) -> None:
    """Check a cache's own index, before anything is sent.

    Raises:
        ShardError: it is not the one that the manifest lists.
    """
    if manifest.samples and not samples.is_there(cache, manifest.samples):
        raise ShardError(
            f"{cache / SAMPLES}: missing, damaged or changed; python -m shards seal {cache} "
            "writes it anew"
        )


def push_index(
    cache: Path, remote: RemoteFolder, manifest: Manifest, *, was_complete: bool
) -> None:
    """Send the index unless it is there.

    Args:
        cache: on this machine.
        remote: its copy.
        manifest: of both.
        was_complete: whether the copy had that manifest before.

    Raises:
        ShardError: it cannot be sent.
    """
    listed = manifest.samples
    if listed and not (was_complete and remote.size(SAMPLES) == listed.num_bytes):
        remote.put(cache / SAMPLES, SAMPLES)
