"""Held-out rows of one set that another set trains on: its held-out loss then says too little."""

from collections.abc import Collection, Iterator, Sequence

from xxhash import xxh3_128_hexdigest

from shards.format.keys import CONTENT_DIGITS
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles
from train.sets.training_set import TrainingSet

# What the contents of held-out images have in exclusive-or; see docs/shard-format.md.
HELD_OUT = int(xxh3_128_hexdigest(b"held out")[:CONTENT_DIGITS], 16)


def describe_overlap(sets: Sequence[TrainingSet]) -> list[str]:
    """Return a line for each set whose held-out images another set trains on.

    Of remote caches nothing is looked at: all their sidecars would be fetched. An image that the
    other cache has as random crops or mirrors alone is not found.
    """
    local = [one for one in sets if isinstance(one.cache.files, LocalFiles)]
    held_out = [
        {content ^ HELD_OUT for content in _contents(one.cache, one.cache.manifest.held_out)}
        for one in local
    ]
    lines = []
    for other in local if any(held_out) else []:
        trained_on = set(_contents(other.cache, other.order.shards))
        for one, kept in zip(local, held_out, strict=True):
            count = len(kept & trained_on)
            if count and str(one.cache.files) != str(other.cache.files):
                lines.append(
                    f"set {other.name} trains on {count} of the {len(kept)} images that "
                    f"{one.name} holds out, so the held-out loss of {one.name} is lower than of "
                    "images never seen; make both with the same --validation-rows and --seed of "
                    "the same rows"
                )
    return lines


def _contents(cache: Cache, shards: Collection[int]) -> Iterator[int]:
    """Yield the contents of conditioning records, the last part of their keys, as numbers."""
    for shard in shards:
        index = cache.conditioning.index(shard)
        for record in range(index.num_records):
            yield int(index.key(record).rpartition("-")[2], 16)
