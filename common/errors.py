"""The errors a user can meet; every command turns them into one line and exit code 2."""


class ShardError(ValueError):
    """A cache is incomplete, damaged, or does not match its sidecars."""


class ConfigError(ValueError):
    """A setting cannot work: says what, where, expected, found, and what to do."""


class RunError(RuntimeError):
    """A run ended early: says what happened, what is kept, and what to do."""


def os_error_line(error: OSError) -> str:
    """Return an operating system's error as one line, with the file's name if it has one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"
