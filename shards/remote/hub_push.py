"""Pushing a cache to a repository of a model hub: many shards a commit, the manifest last."""

import hashlib
import threading
from pathlib import Path

from common.provenance import RUN
from shards.format.manifest import MANIFEST, SAMPLES, Manifest
from shards.format.product import file_sha256
from shards.format.published.dataset_card import CARD
from shards.remote.card import card_to_send
from shards.remote.folder import RemoteFolder
from shards.remote.hub import Repository
from shards.remote.retry import with_retries
from shards.remote.shard_files import (
    ShardFiles,
    TransferResult,
    for_each_shard,
    require_overwrite,
)

# The hub allows some hundred commits an hour, and takes ever longer over one of thousands of files.
SHARDS_A_COMMIT = 64


def push(
    cache: Path, remote: RemoteFolder, manifest: Manifest, *, overwrite: bool
) -> TransferResult:
    """Make a folder of a repository equal to a complete cache of this machine.

    What an interrupted push has sent is not sent again, committed or not.

    Args:
        cache: a complete cache.
        remote: `hf://…`; the repository is made, private, if there is none.
        manifest: of the cache.
        overwrite: whether another complete cache in the folder may be changed.

    Raises:
        ShardError: the cache is damaged, or cannot be sent.
        ConfigError: the folder holds another cache.
    """
    pushing = _Push(cache, remote.url)
    if pushing.is_another(MANIFEST):
        require_overwrite(overwrite, remote.url)
        pushing.remove(MANIFEST, SAMPLES)
    result = for_each_shard(
        "push",
        manifest,
        pushing.differs,
        give_up=pushing.given_up.set,
        copied=pushing.add,
    )
    with card_to_send(cache, remote, manifest) as card:
        pushing.finish(card)
    return result


class _Push:
    """A push in progress.

    Attributes:
        removed: names that the next commit removes.
        given_up: ends the waiting between attempts when it is set.
    """

    def __init__(self, cache: Path, url: str) -> None:
        self.cache = cache
        self.url = url
        self.given_up = threading.Event()
        self.removed: tuple[str, ...] = ()
        self._repository = Repository(url)
        self._digests = with_retries(url, self._repository.digests, self.given_up)
        self._waiting: dict[str, Path] = {}
        self._num_commits = 0

    def differs(self, files: ShardFiles) -> bool:
        """Check a shard's own files; return whether the repository has others or none."""
        files.check(self.cache)
        tar = self._is_there(files.tar, files.tar_sha256)
        return not (tar and self._is_there(files.sidecar, files.sidecar_sha256))

    def add(self, files: ShardFiles) -> None:
        """Have a shard sent, with others."""
        for name in (files.tar, files.sidecar):
            self._waiting[name] = self.cache / name
        if len(self._waiting) >= 2 * SHARDS_A_COMMIT:
            self._commit()

    def finish(self, card: Path | None) -> None:
        """Send what waits, and with it the manifest and a card."""
        if card:
            self._waiting[CARD] = card
        for name in (RUN, SAMPLES, MANIFEST):
            path = self.cache / name
            if path.is_file() and not self._is_there(name, file_sha256(path)):
                self._waiting[name] = path
        if self._waiting:
            self._commit()

    def remove(self, *names: str) -> None:
        """Have the next commit remove files, those of them that are there."""
        self.removed = tuple(name for name in names if self._digests.pop(name, None))

    def is_another(self, name: str) -> bool:
        """Tell whether the repository has a file of this name and other bytes."""
        return name in self._digests and not self._is_there(name, file_sha256(self.cache / name))

    def _is_there(self, name: str, sha256: str) -> bool:
        digest = self._digests.get(name, "")
        if len(digest) == len(sha256):  # through git-lfs; git names other files by SHA-1
            return digest == sha256
        return bool(digest) and digest == _git_blob((self.cache / name).read_bytes())

    def _commit(self) -> None:
        self._num_commits += 1
        files, message = self._waiting, f"Cache of shards, part {self._num_commits}"
        removed = tuple(name for name in self.removed if name not in files)

        def commit() -> None:
            self._repository.commit(message, files, removed)

        with_retries(self.url, commit, self.given_up)
        self._waiting, self.removed = {}, ()


def _git_blob(data: bytes) -> str:
    """Return the name that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
