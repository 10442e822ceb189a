"""Caches in repositories of a model hub: read at one commit, written in few commits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigError


def pinned(url: str) -> str:
    """Return a hub folder's address as it is at the newest commit.

    What is read by it stays the same when somebody pushes, and a listing of it never changes.

    Args:
        url: `hf://…`; of a repository, or of a bucket, which has no commits.
    """
    uri = parse(url)
    if uri.is_bucket:
        return url
    commit = _api().repo_info(uri.id, repo_type=uri.type, revision=uri.revision).sha
    return f"hf://{uri.type}s/{uri.id}@{commit}/{uri.path_in_repo}".rstrip("/")


def parse(url: str) -> Any:
    """Return a `huggingface_hub.utils.HfUri`.

    Raises:
        ConfigError: not an address on the hub.
    """
    from huggingface_hub.utils import parse_hf_uri

    try:
        return parse_hf_uri(url)
    except ValueError as error:
        raise ConfigError(f"{url}: not a folder on the hub: hf://datasets/OWNER/NAME.") from error


class Repository:
    """A folder of a repository, to be written.

    Args:
        url: `hf://datasets/owner/name/folder`.

    Raises:
        ConfigError: not an address on the hub.
    """

    def __init__(self, url: str) -> None:
        self.uri = parse(url)
        self._where = {"repo_id": self.uri.id, "repo_type": self.uri.type}

    def digests(self) -> dict[str, str]:
        """Return name -> digest of all files; the repository is made, private, if there is none.

        That is the SHA-256 of what is stored through git-lfs, and git's own SHA-1 of the rest.
        """
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        folder = self.uri.path_in_repo
        revision = self.uri.revision
        try:
            entries = list(
                _api().list_repo_tree(
                    path_in_repo=folder, recursive=True, revision=revision, **self._where
                )
            )
        except EntryNotFoundError:
            return {}
        except RepositoryNotFoundError:
            _api().create_repo(private=True, exist_ok=True, **self._where)
            return {}
        return {
            entry.path.removeprefix(f"{folder}/"): entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def commit(self, message: str, files: Mapping[str, Path], removed: tuple[str, ...]) -> None:
        """Remove and add files at once; those that are there already are not sent again.

        Args:
            message: of the commit.
            files: name in the folder -> path on this machine.
            removed: names in the folder; all are there, and none is in `files`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        deletions = [CommitOperationDelete(self._path(name)) for name in removed]
        additions = [
            CommitOperationAdd(self._path(name), str(path)) for name, path in files.items()
        ]
        _api().create_commit(
            operations=[*deletions, *additions],
            commit_message=message,
            revision=self.uri.revision,
            **self._where,
        )

    def _path(self, name: str) -> str:
        folder = self.uri.path_in_repo
        return f"{folder}/{name}" if folder else name


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()
