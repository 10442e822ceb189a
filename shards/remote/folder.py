"""A cache behind a URL: single files fetched whole, checked on arrival, and put in their place."""

import contextlib
import os
import random
import re
import tempfile
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback

from common.atomic_files import DISK_FULL, cannot_write, move_into_place
from common.errors import ConfigError, ShardError
from shards.format.json_files import LARGEST_FILE_BYTES
from shards.reading.location import file_sha256

# Each is a plain store of files. Of fsspec's others some run commands or unpack archives, and may
# be chained; a cache's address shall not be a program.
SCHEMES = ("s3", "gs", "hf", "http", "https")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")

ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # then twice as long each time: half a minute in all
STALL_S = 60.0  # a server that sends nothing for so long has gone
# What trying again does not change: no such file, no access, gone for good.
FINAL_STATUSES = (400, 401, 403, 404, 405, 410, 451)


def is_url(location: str) -> bool:
    """Tell whether a location is meant as a URL rather than as a folder's path."""
    return SCHEME.match(location) is not None


class RemoteFolder:
    """A folder behind a URL.

    Args:
        url: e.g. `s3://bucket/cache`; see `SCHEMES`.

    Raises:
        ConfigError: not such a URL.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        scheme, _, rest = self.url.partition("://")
        if scheme not in SCHEMES or "::" in url or not rest:
            raise ConfigError(
                f"{url}: not an address of a cache; give a folder, or one of "
                f"{', '.join(f'{one}://' for one in SCHEMES)}."
            )
        if re.search(r"[?#]", rest):
            raise ConfigError(f"{url}: an address with ? or # is not that of a folder.")
        self.scheme = scheme
        self._given_up = threading.Event()

    def __str__(self) -> str:
        return self.url

    @cached_property
    def fs(self) -> AbstractFileSystem:
        """fsspec's file system for the URL.

        Raises:
            ConfigError: the package that it needs is not installed.
        """
        import fsspec

        try:
            return fsspec.filesystem(self.scheme, skip_instance_cache=True, **self._options())
        except ImportError as error:
            package = PACKAGES.get(self.scheme, "huggingface_hub")
            raise ConfigError(f"{self.url}: needs {package}: pip install {package}") from error

    def _options(self) -> dict[str, Any]:
        if self.scheme in ("http", "https"):
            import aiohttp

            # The library's own limit is five minutes a file, whatever its size.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
            return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
        if self.scheme == "s3":
            return {"config_kwargs": {"connect_timeout": STALL_S, "read_timeout": STALL_S}}
        return {}

    def fetch(self, name: str, target: Path, *, size: int | None, sha256: str | None) -> None:
        """Fetch a file, again if need be; it is at `target` when it has come and been checked.

        On its way it is called `<target>.<process>.part`. That is what a killed process leaves
        behind; nobody reads it.

        Args:
            name: relative to the folder.
            target: where it is wanted; its folder is made if missing.
            size: how many bytes it has; None for a small JSON file of unknown size.
            sha256: of its bytes, if that is known.

        Raises:
            ShardError: it cannot be had, or other bytes come; with the URL and the reason.
            OSError: it cannot be written here.
        """
        # Hugging Face's own fast path is taken without a callback only, and knows the size itself.
        limit = LARGEST_FILE_BYTES if size is None else size
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        given_up = self._given_up

        def get() -> None:
            options: dict[str, Any] = {}
            if self.scheme != "hf":
                options["callback"] = _Limit(limit, given_up)
            elif (self._info_size(name) or 0) > limit:
                raise _TooLongError(f"has more than the {limit} bytes expected")
            self.fs.get_file(self._url(name), str(part), **options)
            _check(part, size, sha256)

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._persist(name, get)
            move_into_place(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise cannot_write(target, error, size or 0) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def put(self, path: Path, name: str) -> None:
        """Send a file, again if need be.

        Raises:
            ShardError: it cannot be sent; with the URL and the reason.
        """

        def send() -> None:
            self.fs.put_file(str(path), self._url(name))
            sent, there = path.stat().st_size, self._info_size(name)
            if sent != there:
                raise _CutShortError(f"{sent} bytes were sent, and {there} are there")

        self._persist(name, send)

    def size(self, name: str) -> int | None:
        """Return how many bytes a file has, or None if there is none.

        Raises:
            ShardError: that cannot be found out.
        """
        found: list[int | None] = []
        self._persist(name, lambda: found.append(self._info_size(name)))
        return found[0]

    def remove(self, name: str) -> None:
        """Remove a file, if there is one.

        Raises:
            ShardError: it cannot be removed.
        """

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._url(name))

        self._persist(name, remove)

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file.

        Raises:
            ShardError: see `fetch`.
        """
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            self.fetch(name, target, size=None, sha256=None)
            return target.read_bytes()

    def give_up(self) -> None:
        """Have other threads end what they are transferring, as soon as may be.

        Raised in them is a ShardError. What begins after this is not meant.
        """
        self._given_up.set()
        self._given_up = threading.Event()

    def _url(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _info_size(self, name: str) -> int | None:
        self.fs.invalidate_cache()
        try:
            size: int | None = self.fs.info(self._url(name))["size"]
        except FileNotFoundError:
            return None
        return size

    def _persist(self, name: str, act: Callable[[], None]) -> None:
        """Do something with a file until it succeeds, or there is no hope.

        Raises:
            ShardError: with the URL and the reason.
            OSError: it cannot be read or written here.
        """
        given_up = self._given_up
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return act()
            except Exception as error:  # of many libraries, which share no base class
                if isinstance(error, ConfigError) or _is_local(error):
                    raise
                # The same wrong bytes twice: that is what is there.
                again = isinstance(error, _OtherBytesError) and attempt > 1
                if again or _is_final(error) or attempt == ATTEMPTS or given_up.is_set():
                    tries = "" if attempt == 1 else f" (tried {attempt} times)"
                    raise ShardError(f"{self._url(name)}: {_reason(error)}{tries}") from error
            if given_up.wait(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)):
                raise ShardError(f"{self._url(name)}: given up")
        raise AssertionError("the last attempt returns or raises")


class _Limit(Callback):  # type: ignore[misc]  # fsspec has no annotations
    """Ends a transfer of more bytes than there can be, or that nobody waits for."""

    def __init__(self, limit: int, given_up: threading.Event) -> None:
        super().__init__()
        self.limit = limit
        self.given_up = given_up

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.given_up.is_set():
            raise _TransferError("given up")
        if self.value > self.limit:
            raise _TooLongError(f"sends more than the {self.limit} bytes expected")


class _TransferError(Exception):
    """What is wrong with a transfer that the library thinks a success."""


class _TooLongError(_TransferError):
    pass


class _CutShortError(_TransferError):
    pass


class _OtherBytesError(_TransferError):
    pass


def _check(path: Path, size: int | None, sha256: str | None) -> None:
    """Hold a fetched file against what it should be."""
    found = path.stat().st_size
    if size is not None and found != size:
        raise _CutShortError(f"cut short, {size} bytes expected, {found} came")
    came = file_sha256(path)
    if sha256 is not None and came != sha256:
        raise _OtherBytesError(
            f"not the bytes that the manifest lists: sha256 {sha256} expected, {came} came"
        )


def _is_local(error: Exception) -> bool:
    """Tell whether an error is of this machine's disk: full, or of one of its paths."""
    if not isinstance(error, OSError):
        return False
    return error.errno in DISK_FULL or Path(str(error.filename)).is_absolute()


def _is_final(error: Exception) -> bool:
    """Tell whether trying again is in vain."""
    status = getattr(error, "status", None)
    refused = (FileNotFoundError, PermissionError, ValueError, TypeError, _TooLongError)
    credentials = type(error).__name__ in ("NoCredentialsError", "GatedRepoError")
    return isinstance(error, refused) or credentials or status in FINAL_STATUSES


def _reason(error: Exception) -> str:
    """Return what a library says of its failure, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file there"
    if isinstance(error, _TransferError):
        return str(error)
    status = getattr(error, "status", None)
    if status is not None:
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, TimeoutError):
        return f"the server sent nothing for {STALL_S:g} s"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
