"""Shapes and dtypes of a record's tensors, and the safetensors header that tells of them.

Dtypes go by torch's names, so that nothing here needs torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from shards.format.json_files import Count

ITEM_BYTES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
SAFETENSORS_DTYPES = {"U8": "uint8", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}
LENGTH_BYTES = 8  # of the number before a safetensors header, little-endian
# A text record of SD3 has a header of 200 bytes.
LARGEST_HEADER_BYTES = 1 << 14


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that each record of a product has.

    Attributes:
        shape: sizes of the axes.
        dtype: one of `ITEM_BYTES`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        """Return e.g. `[16, 128, 128] float16`."""
        return f"{list(self.shape)} {self.dtype}"


def record_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Return the size of a record's tensors."""
    return sum(spec.num_bytes for spec in specs.values())


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in a safetensors header."""

    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


def tensor_order(header: bytes, specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the names of a record's tensors in the order of their data.

    Args:
        header: the first bytes of a safetensors file, up to the data.
        specs: the tensors that the record must hold, no more and no less.

    Raises:
        ValueError: the header differs from the specs; naming all differences.
    """
    try:
        entries = msgspec.json.decode(header[LENGTH_BYTES:], type=dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"damaged record, not safetensors ({error})") from error
    differences = _differences(entries, specs)
    if differences:
        raise ValueError("; ".join(differences))
    order = sorted(entries, key=lambda name: entries[name].data_offsets)
    end = 0
    for name in order:
        start, end = end, end + specs[name].num_bytes
        if entries[name].data_offsets != (start, end):
            raise ValueError(f"damaged record, {name} does not lie at {start} to {end}")
    return tuple(order)


def _differences(entries: Mapping[str, _Entry], specs: Mapping[str, TensorSpec]) -> list[str]:
    differences = []
    for name in sorted(entries.keys() | specs.keys()):
        if name not in entries or name not in specs:
            differences.append(f"{name} is {'missing' if name in specs else 'unexpected'}")
            continue
        entry, spec = entries[name], specs[name]
        dtype = SAFETENSORS_DTYPES.get(entry.dtype)
        if tuple(entry.shape) != spec.shape or dtype != spec.dtype:
            found = TensorSpec(tuple(entry.shape), dtype) if dtype else entry.dtype
            differences.append(f"{name} expected {spec}, found {found}")
    return differences
