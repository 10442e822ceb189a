"""Trying a transfer again, as long as there is hope that it succeeds."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

from common.atomic_files import DISK_FULL
from common.errors import ConfigError, ShardError

ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # then twice as long each time: half a minute in all
STALL_S = 60.0  # a server that sends nothing for so long is taken for dead
# Answers that do not change on another attempt: no such file, no access, gone for good.
FINAL_STATUSES = (400, 401, 403, 404, 405, 410, 451)
FINAL_ERRORS = ("NoCredentialsError", "GatedRepoError")


class TransferError(Exception):
    """A fault of a transfer that the library takes for a success."""


class TooLongError(TransferError):
    """More bytes came than the file has."""


class CutShortError(TransferError):
    """Fewer bytes came or were stored than the file has."""


class OtherBytesError(TransferError):
    """The bytes are not those that the manifest lists."""


def with_retries(url: str, act: Callable[[], None], given_up: threading.Event) -> None:
    """Call `act` until it succeeds, or another attempt is useless.

    Args:
        url: of the file, for the error.
        act: transfers it.
        given_up: ends the waiting between attempts when it is set.

    Raises:
        ShardError: with the URL and the reason.
        OSError: the file cannot be read or written on this machine.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return act()
        except Exception as error:  # of many libraries, which share no base class
            if isinstance(error, ConfigError) or _is_local(error):
                raise
            # The same wrong bytes twice: the server has no others.
            wrong_again = isinstance(error, OtherBytesError) and attempt > 1
            if wrong_again or _is_final(error) or attempt == ATTEMPTS or given_up.is_set():
                tries = "" if attempt == 1 else f" (tried {attempt} times)"
                raise ShardError(f"{url}: {_reason(error)}{tries}") from error
        if given_up.wait(FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)):
            raise ShardError(f"{url}: given up")
    raise AssertionError("the last attempt returns or raises")


def _is_local(error: Exception) -> bool:
    """Tell whether an error is of this machine's disk: full, or of one of its paths."""
    if not isinstance(error, OSError):
        return False
    return error.errno in DISK_FULL or Path(str(error.filename)).is_absolute()


def _is_final(error: Exception) -> bool:
    """Tell whether another attempt is useless."""
    status = getattr(error, "status", None)
    refused = (FileNotFoundError, PermissionError, ValueError, TypeError, TooLongError)
    return (
        isinstance(error, refused)
        or type(error).__name__ in FINAL_ERRORS
        or status in FINAL_STATUSES
    )


def _reason(error: Exception) -> str:
    """Return a library's error in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file there"
    if isinstance(error, TransferError):
        return str(error)
    status = getattr(error, "status", None)
    if status is not None:
        return f"the server answers {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, TimeoutError):
        return f"the server sent nothing for {STALL_S:g} s"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
