"""A record's two tar members: `<key>.safetensors` and `<key>.json`, as bytes."""

import json
from typing import Any, NamedTuple

import msgspec

SUFFIXES = (".safetensors", ".json")
# A caption rarely has more than a thousand bytes.
LARGEST_METADATA_BYTES = 1 << 20


class Members(NamedTuple):
    """A record as the bytes of its two tar members."""

    key: str
    tensors: bytes
    metadata: bytes


def metadata_to_bytes(metadata: dict[str, Any]) -> bytes:
    """Return the content of a `.json` member; equal values give equal bytes."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()


def metadata_from_bytes(data: bytes) -> dict[str, Any]:
    """Return the values in a `.json` member.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"damaged record, not a JSON object ({error})") from error
