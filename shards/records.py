"""Records: what one tar member pair `<key>.safetensors` + `<key>.json` holds.

Axes: T tokens, C latent channels (16), h x w latent grid (pixels / 8).
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import safetensors.torch
from msgspec import Meta
from safetensors import SafetensorError
from torch import Tensor

from shards.errors import ShardError

# What `record_key` makes.
Key = Annotated[str, Meta(pattern=r"^[0-9]{6,}-[0-9]{5,}-[0-9a-f]{16}\Z", max_length=64)]


@dataclass(frozen=True)
class Record:
    """One text, image, conditioning image or validation pair, encoded.

    Attributes:
        key: unique in its product and free of dots; see `record_key`.
        tensors: by name, e.g. `latent` [C, h, w] or `clip_embeds` [T, 2048].
        about: what they are; plain JSON values.
    """

    key: str
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def record_key(shard: int, row: int, content_hash: str) -> str:
    """Return the key of row `row` of shard `shard`: where it stands, and 16 digits of what it is.

    The place makes a reference to a record an address. The content makes a reference that has
    gone stale recognisable.
    """
    return f"{shard:06d}-{row:05d}-{content_hash[:16]}"


def shard_of(key: str) -> int:
    """Return the shard number that a key names.

    Raises:
        ShardError: not a key made by `record_key`.
    """
    shard, _, rest = key.partition("-")
    if not (shard.isdecimal() and rest):
        raise ShardError(f"{key!r} is not a record key (shard-row-content)")
    return int(shard)


def to_bytes(record: Record) -> tuple[bytes, bytes]:
    """Return the contents of the record's two tar members; equal records give equal bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in record.tensors.items()}
    about = json.dumps(record.about, ensure_ascii=False, sort_keys=True)
    return safetensors.torch.save(tensors), about.encode()


def tensors_from_bytes(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` member.

    Args:
        data: the member's bytes.
        where: file and key, for the error.

    Raises:
        ShardError: not safetensors.
    """
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ShardError(f"{where}: damaged record, not safetensors ({error})") from error


def about_from_bytes(data: bytes, where: str) -> dict[str, Any]:
    """Return the content of a `.json` member.

    Raises:
        ShardError: not a JSON object.
    """
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where}: damaged record, not JSON ({error})") from error
    if not isinstance(about, dict):
        raise ShardError(f"{where}: damaged record, expected a JSON object")
    return about
