"""The errors a user can meet; every command turns them into one line and exit code 2."""


class ShardError(ValueError):
    """A cache that is incomplete, damaged, or not what its sidecars say it is."""


class ConfigError(ValueError):
    """A setting that cannot be honoured: what, where, expected, found, and what to do."""


class RunError(RuntimeError):
    """What ends a run that was well begun: what happened, what is kept, and what to do."""
