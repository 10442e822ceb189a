"""Record keys: `<shard>-<slot>-<content>`, the address of a record and 16 digits of its content."""

from common.errors import ShardError

# What `record_key` makes.
KEY = r"[0-9]{6,9}-[0-9]{5,9}-[0-9a-f]{16}"
CONTENT_DIGITS = 16


def record_key(shard: int, slot: int, content_hash: str) -> str:
    """Return the key of the record in a slot of a shard.

    Shard and slot make a reference to a record an address. The content makes a reference that has
    gone stale recognisable.

    Args:
        shard: number of the shard.
        slot: place in the shard; slots that hold no record leave gaps.
        content_hash: hexadecimal, of the prompt or of the image file.
    """
    return f"{shard:06d}-{slot:05d}-{content_hash[:CONTENT_DIGITS]}"


def slot_of(key: str) -> tuple[int, int]:
    """Return the shard number and the slot that a key names.

    Raises:
        ShardError: not a key made by `record_key`.
    """
    shard, _, rest = key.partition("-")
    slot, _, content = rest.partition("-")
    if not (shard.isdecimal() and slot.isdecimal() and content):
        raise ShardError(f"{key!r} is not a record key (shard-slot-content)")
    return int(shard), int(slot)
