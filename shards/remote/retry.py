"""Trying a transfer again, as long as there is hope that it succeeds."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from common.atomic_files import DISK_FULL
from common.errors import ConfigError, ShardError

ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # then twice as long each time: half a minute in all
STALL_S = 60.0  # a server that sends nothing for so long is taken for dead
# Of the answers that blame the request, those that another attempt may change: too slow, too early,
# too many, in conflict with another.
PASSING_STATUSES = (408, 409, 412, 423, 425, 429)
FINAL_ERRORS = ("NoCredentialsError", "LocalTokenNotFoundError", "OfflineModeIsEnabled")
UNKNOWN_ON_THE_HUB = ("RepositoryNotFoundError", "RevisionNotFoundError")

Result = TypeVar("Result")


class TransferError(Exception):
    """A fault of a transfer that the library takes for a success."""


class TooLongError(TransferError):
    """More bytes came than the file has."""


class CutShortError(TransferError):
    """Fewer bytes came or were stored than the file has."""


class OtherBytesError(TransferError):
    """The bytes are not those that the manifest lists."""


def with_retries(url: str, act: Callable[[], Result], given_up: threading.Event) -> Result:
    """Call `act` until it succeeds, or another attempt is useless; return what it returns.

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


def is_missing(error: Exception) -> bool:
    """Tell whether an error says that there is no such file."""
    if type(error).__name__.endswith("EntryNotFoundError"):  # the hub's
        return True
    return isinstance(error, FileNotFoundError) and not _unknown_on_the_hub(error)


def _is_final(error: Exception) -> bool:
    """Tell whether another attempt is useless."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in PASSING_STATUSES
    refused = (FileNotFoundError, PermissionError, ValueError, TypeError, TooLongError)
    return isinstance(error, refused) or type(error).__name__ in FINAL_ERRORS


def _status(error: Exception) -> int | None:
    """Return the HTTP status behind an error, wherever its library keeps it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # the hub's, aiohttp's
            status = getattr(response, "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int):
            return status
    # gcsfs's. Behind an error of aiohttp's it may stand for an answer that was cut short.
    code = getattr(error, "code", None)
    return int(str(code)) if str(code).isdecimal() else None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _unknown_on_the_hub(error: Exception) -> bool:
    return any(type(cause).__name__ in UNKNOWN_ON_THE_HUB for cause in _causes(error))


def _reason(error: Exception) -> str:
    """Return a library's error in one line."""
    if is_missing(error):
        return "no such file there"
    if isinstance(error, TransferError):
        return str(error)
    if any(type(cause).__name__ == "GatedRepoError" for cause in _causes(error)):
        return "gated: accept its terms on its hub page, then `hf auth login`"
    if _unknown_on_the_hub(error):
        return "no such repository or revision on the hub, or it is private: `hf auth login`"
    status = _status(error)
    if status is not None:
        hint = "; check the credentials" if status in (401, 403) else ""
        message = _message(error).removeprefix(str(status)).strip()
        return f"the server answers {status} {message}".rstrip() + hint
    if isinstance(error, TimeoutError):
        return f"the server sent nothing for {STALL_S:g} s"
    return f"{type(error).__name__}: {_message(error)}".rstrip(": ")


def _message(error: Exception) -> str:
    """Return the first line of what a library says."""
    text = str(getattr(error, "message", "") or error).strip()
    return text.splitlines()[0] if text else ""
