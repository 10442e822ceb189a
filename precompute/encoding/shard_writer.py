"""Writing shards in a thread of its own, so that a slow disk does not hold up the encoders."""

from concurrent.futures import Future, ThreadPoolExecutor

from precompute.encoding.shard_build import ShardBuild
from shards.format.members import Members


class ShardWriter:
    """Writes shards in a thread, one at a time, in the order they are submitted.

    At most one shard is in memory here while the next is encoded. When the `with` block ends, even
    by an exception, the current shard is finished first.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write")
        self._current: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Finish the current shard; raise its error, if it has one."""
        with self._thread:
            self._finish()

    def submit(self, build: ShardBuild, records: list[Members]) -> None:
        """Write a shard, once the one before it is written.

        Args:
            build: the shard.
            records: the members of its records, by ascending slot.

        Raises:
            ShardError, OSError: the shard before it could not be written.
        """
        self._finish()
        self._current = self._thread.submit(build.write, records)

    def raise_error(self) -> None:
        """Raise the error of the last shard if it has failed; do not wait for it."""
        if self._current is not None and self._current.done():
            self._finish()

    def _finish(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.result()
