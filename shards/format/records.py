"""Records: what one tar member pair `<key>.safetensors` + `<key>.json` holds.

Axes: T tokens, C latent channels (16), h x w latent grid (pixels / 8).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from common.errors import ShardError
from shards.format.json_files import Count

# What `record_key` makes.
KEY = r"[0-9]{6,9}-[0-9]{5,9}-[0-9a-f]{16}"
# A text record of SD3 has a header of 200 bytes, a caption rarely more than a thousand.
LARGEST_HEADER_BYTES = 1 << 14
LARGEST_ABOUT_BYTES = 1 << 20
LENGTH_BYTES = 8  # of the number before a safetensors header, little-endian
SAFETENSORS_DTYPES = {
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


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


class Members(NamedTuple):
    """A record as the bytes of its two tar members."""

    key: str
    tensors: bytes
    about: bytes


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that each record of a product has."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        """Return e.g. `[16, 128, 128] float16`."""
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


def record_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Return the size of a record's tensors."""
    return sum(spec.num_bytes for spec in tensors.values())


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in a safetensors header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


def record_key(shard: int, row: int, content_hash: str) -> str:
    """Return the key of row `row` of shard `shard`: where it stands, and 16 digits of what it is.

    The place makes a reference to a record an address. The content makes a reference that has
    gone stale recognisable.
    """
    return f"{shard:06d}-{row:05d}-{content_hash[:16]}"


def place_of(key: str) -> tuple[int, int]:
    """Return the shard number and the row that a key names.

    Raises:
        ShardError: not a key made by `record_key`.
    """
    shard, _, rest = key.partition("-")
    row, _, content = rest.partition("-")
    if not (shard.isdecimal() and row.isdecimal() and content):
        raise ShardError(f"{key!r} is not a record key (shard-row-content)")
    return int(shard), int(row)


def to_members(record: Record) -> Members:
    """Return the record's two tar members; equal records give equal bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in record.tensors.items()}
    return Members(record.key, safetensors.torch.save(tensors), about_to_bytes(record.about))


def about_to_bytes(about: dict[str, Any]) -> bytes:
    """Return the content of a `.json` member."""
    return json.dumps(about, ensure_ascii=False, sort_keys=True).encode()


def tensor_order(header: bytes, expected: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the names of a record's tensors in the order in which their data lies.

    Args:
        header: a safetensors file's first bytes, up to where the data begins.
        expected: what the record must hold, no more and no less.

    Raises:
        ValueError: saying what is not as expected.
    """
    try:
        entries = msgspec.json.decode(header[LENGTH_BYTES:], type=dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"damaged record, not safetensors ({error})") from error
    wrong = []
    for name in sorted(entries.keys() | expected.keys()):
        if name not in entries or name not in expected:
            wrong.append(f"{name} is {'missing' if name in expected else 'unexpected'}")
            continue
        entry, spec = entries[name], expected[name]
        dtype = SAFETENSORS_DTYPES.get(entry.dtype)
        if tuple(entry.shape) != spec.shape or dtype != spec.dtype:
            found = TensorSpec(tuple(entry.shape), dtype) if dtype else entry.dtype
            wrong.append(f"{name} expected {spec}, found {found}")
    if wrong:
        raise ValueError("; ".join(wrong))
    order = sorted(entries, key=lambda name: entries[name].data_offsets)
    end = 0
    for name in order:
        start, end = end, end + expected[name].num_bytes
        if entries[name].data_offsets != (start, end):
            raise ValueError(f"damaged record, {name} does not lie at {start} to {end}")
    return tuple(order)


def about_from_bytes(data: bytes) -> dict[str, Any]:
    """Return the content of a `.json` member.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"damaged record, not a JSON object ({error})") from error
