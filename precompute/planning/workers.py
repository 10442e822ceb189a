"""The shards of one worker: each of n workers builds every n-th shard, and waits for no other."""

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One of `count` workers, counted from 0."""

    index: int = 0
    count: int = 1

    def has(self, shard: int) -> bool:
        """Tell whether this worker builds a shard."""
        return shard % self.count == self.index

    @property
    def leads(self) -> bool:
        """Whether this is the worker that prints for all."""
        return self.index == 0

    def __str__(self) -> str:
        """Return e.g. `2/8`."""
        return f"{self.index}/{self.count}"


def find_part(given: str | None, environment: Mapping[str, str]) -> Part:
    """Return this process's part: its rank under `accelerate launch`, within `--part`.

    Args:
        given: `i/n`, i from 0 to n - 1; or None.
        environment: of the process; `RANK` and `WORLD_SIZE` are read.

    Raises:
        ConfigError: `given` has another form.
    """
    part = _parse(given) if given is not None else Part()
    rank, world = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
    return Part(part.index * world + rank, part.count * world)


def _parse(given: str) -> Part:
    index, _, count = given.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            f"--part {given}: expected i/n with i from 0 to n - 1, e.g. 0/4, 1/4, 2/4 and 3/4 on "
            "four machines."
        )
    return Part(int(index), int(count))
