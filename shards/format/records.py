"""Records as stage 1 makes them: tensors and metadata, on their way into a shard.

Axes: T tokens, C latent channels (16), h x w latent grid (pixels / 8).
"""

from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from shards.format.members import Members, metadata_to_bytes


@dataclass(frozen=True)
class Record:
    """One text, image, conditioning image or validation pair, encoded.

    Attributes:
        key: unique in its product and free of dots; see `shards.format.keys.record_key`.
        tensors: by name, e.g. `latent` [C, h, w] or `clip_embeds` [T, 2048].
        metadata: plain JSON values, e.g. the prompt.
    """

    key: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def to_members(record: Record) -> Members:
    """Return the record's two tar members; equal records give equal bytes."""
    tensors = {name: tensor.contiguous() for name, tensor in record.tensors.items()}
    return Members(record.key, safetensors.torch.save(tensors), metadata_to_bytes(record.metadata))
