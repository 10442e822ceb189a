"""Writing shards in a thread of its own, so that a slow disk does not hold up the encoders."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from precompute.encoding.shard_build import ShardBuild
from shards.format.members import Members


class ShardWriter:
    """Writes shards in a thread, one at a time, in the order they are submitted.

    At most one shard is in memory here while the next is encoded. When the `with` block ends, even
    by an exception, the shard in hand is finished first.

    Args:
        written: called in the thread after a shard is on disk.
    """

    def __init__(self, written: Callable[[ShardBuild], object]) -> None:
        self._written = written
        self._thread = ThreadPoolExecutor(1, "write")
        self._in_hand: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Finish the shard in hand; raise its error, if it has one."""
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
        self._in_hand = self._thread.submit(self._write, build, records)

    def raise_error(self) -> None:
        """Raise the error of the last shard if it has failed; do not wait for it."""
        if self._in_hand is not None and self._in_hand.done():
            self._finish()

    def _write(self, build: ShardBuild, records: list[Members]) -> None:
        build.write(records)
        self._written(build)

    def _finish(self) -> None:
        in_hand, self._in_hand = self._in_hand, None
        if in_hand is not None:
            in_hand.result()
