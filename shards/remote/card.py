"""The data set card on its way to a remote cache."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shards.format.manifest import Manifest
from shards.format.published.dataset_card import CARD, updated
from shards.remote.folder import RemoteFolder


@contextlib.contextmanager
def card_to_send(cache: Path, remote: RemoteFolder, manifest: Manifest) -> Iterator[Path | None]:
    """Give the file to send as a remote cache's card; None if it is to stay as it is.

    One that is there is kept, since cards are edited on the hub: only what the manifest says is
    written anew in it.

    Args:
        cache: on this machine.
        remote: its copy.
        manifest: of the cache.

    Raises:
        ShardError: the remote card cannot be read.
    """
    if remote.size(CARD) is None:
        own = cache / CARD
        yield own if own.is_file() else None
        return
    before = remote.read(CARD).decode(errors="surrogateescape")
    now = updated(before, manifest, f"{remote}/{CARD}")
    if now == before:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CARD
        path.write_bytes(now.encode(errors="surrogateescape"))
        yield path
