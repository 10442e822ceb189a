"""A cache behind a URL: single files fetched whole, checked on arrival, and put in their place."""

import hashlib
import random
import re
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback

from shards.errors import ConfigError, ShardError
from shards.files import file_sha256
from shards.plain import LARGEST_FILE_BYTES
from shards.writer import DISK_FULL

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
            return fsspec.filesystem(self.scheme, **self._options())
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
        """Fetch a file to `target`, again if need be; what comes is checked.

        Args:
            name: relative to the folder.
            target: overwritten; left behind half-written if the process is killed, so never a
                name under which anybody looks for the file.
            size: how many bytes it has; None for a small JSON file of unknown size.
            sha256: of its bytes, if that is known.

        Raises:
            ShardError: it cannot be had, or other bytes come; with the URL and the reason.
            OSError: it cannot be written here.
        """
        url = f"{self.url}/{name}"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._transfer(url, target, size)
                reason = _mismatch(target, size, sha256)
                if reason is None:
                    return
                final = attempt > 1 and "sha256" in reason  # sent the same twice: it is so there
            except Exception as error:  # of many libraries, which share no base class
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    target.unlink(missing_ok=True)
                    raise OSError(error.errno, error.strerror, str(target)) from error
                reason, final = _reason(error), _is_final(error)
            if final or attempt == ATTEMPTS:
                target.unlink(missing_ok=True)
                tries = "" if attempt == 1 else f" (tried {attempt} times)"
                raise ShardError(f"{url}: {reason}{tries}")
            time.sleep(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))

    def read(self, name: str, folder: Path) -> bytes:
        """Return the bytes of a small file.

        Args:
            name: relative to the remote folder.
            folder: here, for the file on its way.

        Raises:
            ShardError: see `fetch`.
        """
        target = folder / f".{hashlib.sha256(f'{self.url}/{name}'.encode()).hexdigest()[:16]}.part"
        self.fetch(name, target, size=None, sha256=None)
        data = target.read_bytes()
        target.unlink()
        return data

    def _transfer(self, url: str, target: Path, size: int | None) -> None:
        # Hugging Face's own fast path is taken without a callback only, and knows the size itself.
        limit = LARGEST_FILE_BYTES if size is None else size
        options = {} if self.scheme == "hf" else {"callback": _Limit(limit)}
        self.fs.get_file(url, str(target), **options)


class _Limit(Callback):  # type: ignore[misc]  # fsspec has no annotations
    """Ends a transfer of more bytes than there can be."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.limit:
            raise _TooLongError(f"sends more than the {self.limit} bytes expected")


class _TooLongError(Exception):
    pass


def _mismatch(path: Path, size: int | None, sha256: str | None) -> str | None:
    """Return what is wrong with a fetched file, or None."""
    found = path.stat().st_size
    if size is not None and found != size:
        return f"cut short, {size} bytes expected, {found} came"
    if sha256 is not None:
        came = file_sha256(path)
        if came != sha256:
            return f"not the bytes that the manifest lists: sha256 {sha256} expected, {came} came"
    return None


def _is_final(error: Exception) -> bool:
    """Tell whether trying again is in vain."""
    status = getattr(error, "status", None)
    refused = (FileNotFoundError, PermissionError, _TooLongError, ConfigError)
    credentials = type(error).__name__ in ("NoCredentialsError", "GatedRepoError")
    return isinstance(error, refused) or credentials or status in FINAL_STATUSES


def _reason(error: Exception) -> str:
    """Return what a library says of its failure, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file there"
    status = getattr(error, "status", None)
    if status is not None:
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, TimeoutError):
        return f"the server sent nothing for {STALL_S:g} s"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
