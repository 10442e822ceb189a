"""A set of samples that a run trains on: one control of one cache, or a range of its records."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import ConfigError
from shards.reading.cache import Cache
from shards.reading.order import Order

LIKE_A_RANGE = re.compile(r".+\[[^/\[\]]*\]")
RANGE = re.compile(r"(?P<location>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")


@dataclass(frozen=True)
class TrainingSet:
    """A set of samples.

    Attributes:
        name: of its curves, unique in a run; empty where a run has this set alone.
        location: of its cache, a folder or a URL.
        records: its first training record, and the one behind its last, in the cache's order.
        cache: opened for reading.
        order: in which its samples come.
        weight: how often it comes, beside the others' weights.
    """

    name: str
    location: str
    records: tuple[int, int]
    cache: Cache
    order: Order
    weight: int

    @property
    def is_whole(self) -> bool:
        """Whether it has all of the cache's training records."""
        records = self.cache.manifest.training_records(self.cache.conditioning_name)
        return self.order.num_records == sum(records)


def parse_location(text: str) -> tuple[str, slice]:
    """Return a cache's location, and the range of its records: `a[:1000]` has the first 1,000.

    Raises:
        ConfigError: it ends like a range, and is none.
    """
    found = RANGE.fullmatch(text)
    if found is None:
        if LIKE_A_RANGE.fullmatch(text) and not Path(text).exists():
            raise ConfigError(
                f"--cache {text}: no such folder, and no range; a range is cache[:1000], the first "
                "1,000 samples, cache[1000:], the rest, or cache[-10:], the last 10."
            )
        return text, slice(None)
    start, stop = (int(found[name]) if found[name] else None for name in ("start", "stop"))
    return found["location"], slice(start, stop)


def in_range(shard_records: Sequence[int], start: int, stop: int) -> tuple[list[int], list[int]]:
    """Return how many records of each shard are in a range, and how many before them are not.

    Args:
        shard_records: number of records of each shard.
        start: first record of the range, counted over all shards.
        stop: record behind its last one.
    """
    counts, skipped = [], []
    first = 0
    for size in shard_records:
        low, high = (min(max(end - first, 0), size) for end in (start, stop))
        counts.append(high - low)
        skipped.append(low)
        first += size
    return counts, skipped


def set_names(locations: Sequence[str], controls: Sequence[str]) -> list[str]:
    """Return a short name for each set: what tells them apart, its control, folder or number.

    A single set has none, since nothing need be told apart.
    """
    if len(locations) == 1:
        return [""]
    paths = [PurePosixPath(location.rstrip("/") or "/") for location in locations]
    folders = [path.name for path in paths]
    parents = [path.parent.name for path in paths]
    both = [f"{folder}-{control}" for folder, control in zip(folders, controls, strict=True)]
    for names in (list(controls), folders, parents, both):
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{number + 1}-{name}" for number, name in enumerate(both)]
