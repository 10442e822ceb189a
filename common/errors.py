"""The errors a user can meet; every command turns them into one line and exit code 2."""

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


class ShardError(ValueError):
    """A cache is incomplete, damaged, or does not match its sidecars."""


class ConfigError(ValueError):
    """A setting cannot work: says what, where, expected, found, and what to do."""


class RunError(RuntimeError):
    """A run ended early: says what happened, what is kept, and what to do."""


def raised_everywhere(error: ErrorT) -> ErrorT:
    """Mark an error that all processes of a launch raise alike, so that only one prints it."""
    error.__dict__["raised_everywhere"] = True
    return error


def is_raised_everywhere(error: BaseException | None) -> bool:
    """Return whether all processes of a launch raise this error, or the one that it came from."""
    while error is not None:
        if "raised_everywhere" in error.__dict__:
            return True
        error = error.__cause__
    return False


def os_error_line(error: OSError) -> str:
    """Return an operating system's error as one line, with the file's name if it has one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
