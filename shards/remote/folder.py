"""A cache behind a URL: files are fetched whole, checked, and only then given their names."""

import contextlib
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import TqdmCallback
from tqdm import tqdm

from common.atomic_files import cannot_write, move_into_place
from common.errors import ConfigError
from shards.format.json_files import LARGEST_FILE_BYTES
from shards.format.product import file_sha256
from shards.remote import hub, retry
from shards.remote.retry import (
    CutShortError,
    OtherBytesError,
    Result,
    TooLongError,
    TransferError,
)

# Plain stores of files. Some of fsspec's other schemes run commands or unpack archives, and can be
# chained; the address of a cache must not be a program.
SCHEMES = ("s3", "gs", "hf", "http", "https")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
ABANDONED_AFTER_S = 3600
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


def is_url(location: str) -> bool:
    """Tell whether a location is meant as a URL rather than as a folder's path."""
    return SCHEME.match(location) is not None


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: e.g. `s3://bucket/cache`; see `SCHEMES`.

    Attributes:
        is_repository: whether it is in a repository of the hub; `put` and `remove` are not for
            those (see `shards.remote.hub_push`).

    Raises:
        ConfigError: not such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES or "::" in url or not rest:
            raise ConfigError(
                f"{url}: not an address of a cache; give a folder, or one of "
                f"{', '.join(f'{each}://' for each in SCHEMES)}."
            )
        if re.search(r"[?#]", rest):
            raise ConfigError(f"{url}: an address with ? or # is not that of a folder.")
        self.scheme = scheme
        # A bucket on the hub has no commits.
        self.is_repository = scheme == "hf" and not hub.parse(self.url).is_bucket
        self._given_up = threading.Event()

    def __str__(self) -> str:
        return self.url

    @cached_property
    def fs(self) -> fsspec.AbstractFileSystem:
        """fsspec's file system for the URL.

        Raises:
            ConfigError: the package that it needs is not installed.
        """

        try:
            return fsspec.filesystem(self.scheme, skip_instance_cache=True, **self._options())
        except ImportError as error:
            package = PACKAGES.get(self.scheme, "huggingface_hub")
            raise ConfigError(f"{self.url}: needs {package}: pip install {package}") from error

    def _options(self) -> dict[str, Any]:
        if self.scheme in ("http", "https"):
            import aiohttp

            # The library's own limit is five minutes a file, whatever its size.
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=retry.STALL_S, sock_read=retry.STALL_S
            )
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        if self.scheme == "s3":
            timeouts = {"connect_timeout": retry.STALL_S, "read_timeout": retry.STALL_S}
            return {"config_kwargs": timeouts}
        return {}

    def fetch(self, name: str, target: Path, *, size: int | None, sha256: str | None) -> None:
        """Fetch a file, if necessary several times; give it its name when it has been checked.

        Until then it is called `<target>.<random>.part`. A killed process leaves that behind;
        nobody reads it.

        Args:
            name: relative to the folder.
            target: path on this machine; its folder is made if missing.
            size: number of bytes; None for a small JSON file of unknown size.
            sha256: of its bytes, if that is known.

        Raises:
            ShardError: it cannot be fetched, or other bytes come; with the URL and the reason.
            OSError: it cannot be written here.
        """
        limit = LARGEST_FILE_BYTES if size is None else size
        # Process numbers of two machines that share the disk may be equal.
        part = target.with_name(f"{target.name}.{secrets.token_hex(6)}.part")
        given_up = self._given_up

        def get() -> None:
            self._get(name, part, limit, given_up)
            _check(part, size, sha256)

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._retry(name, get)
            move_into_place(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise cannot_write(target, error, size or 0) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _get(self, name: str, part: Path, limit: int, given_up: threading.Event) -> None:
        bar = {"limit": limit, "given_up": given_up}
        callback = TqdmCallback(bar, tqdm_cls=_Limit)  # the only kind that the hub's library takes
        self.fs.get_file(f"{self._source}/{name}", str(part), callback=callback)

    def put(self, path: Path, name: str) -> None:
        """Send a file, if necessary several times.

        Raises:
            ShardError: it cannot be sent; with the URL and the reason.
        """

        def send() -> None:
            self.fs.put_file(str(path), self._url(name))
            sent, there = path.stat().st_size, self._size(name)
            if sent != there:
                raise CutShortError(f"{sent} bytes were sent, and {there} are there")

        self._retry(name, send)

    def size(self, name: str) -> int | None:
        """Return the number of bytes of a file, or None if there is none.

        Raises:
            ShardError: the server does not tell.
        """
        return self._retry(name, lambda: self._size(name))

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            ShardError: it cannot be removed.
        """

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._url(name))

        self._retry(name, remove)

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file.

        Raises:
            ShardError: it cannot be fetched; with the URL and the reason.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            self.fetch(name, target, size=None, sha256=None)
            return target.read_bytes()

    def give_up(self) -> None:
        """End the transfers of other threads as soon as possible; they raise a ShardError.

        Transfers that begin later are not affected.
        """
        self._given_up.set()
        self._given_up = threading.Event()

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

    @cached_property
    def _source(self) -> str:
        """The URL to read from; of a repository at its newest commit, whatever is pushed later."""
        return hub.pinned(self.url) if self.is_repository else self.url

    def _size(self, name: str) -> int | None:
        if not self.is_repository:
            self.fs.invalidate_cache()
        try:
            size: int | None = self.fs.info(f"{self._source}/{name}")["size"]
        except Exception as error:
            if retry.is_missing(error):
                return None
            raise
        return size

    def _retry(self, name: str, act: Callable[[], Result]) -> Result:
        return retry.with_retries(self._url(name), act, self._given_up)


class _Limit(tqdm):  # type: ignore[type-arg]  # it cannot be subscripted
    """A progress bar that shows nothing; it ends a transfer of too many bytes, or one given up."""

    def __init__(self, limit: int, given_up: threading.Event, **more: Any) -> None:
        super().__init__(disable=True, **more)
        self.limit = limit
        self.given_up = given_up

    def update(self, n: float | None = 1) -> None:
        """Count bytes.

        Raises:
            TransferError: too many, or given up.
        """
        self.n += n or 0
        if self.given_up.is_set():
            raise TransferError("given up")
        if self.n > self.limit:
            raise TooLongError(f"sends more than the {self.limit} bytes expected")


def remove_abandoned(folder: Path) -> None:
    """Remove what transfers that were killed left in a folder of this machine."""
    for part in folder.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
                part.unlink()


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    """Compare a fetched file with what it should be."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise CutShortError(f"cut short, {size} bytes expected, {found} came")
    came = file_sha256(path)
    if sha256 is not None and came != sha256:
        raise OtherBytesError(
            f"not the bytes that the manifest lists: sha256 {sha256} expected, {came} came"
        )
