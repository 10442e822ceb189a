"""Torch tensors of a cache's records; the only module of the readers' core that needs torch.

Axes: B samples.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.format.tensor_spec import TensorSpec
from shards.reading.reader import ProductReader


class TensorReader(ProductReader):
    """Reads the records of one product as torch tensors."""

    def tensors(self, shard: int, index: int) -> dict[str, Tensor]:
        """Return the tensors of record `index` of a shard, by name.

        Raises:
            ShardError: the shard is missing, or the record is damaged or not as the manifest says.
        """
        batch = empty_tensors(self.specs[self.bucket(shard)], 1)
        views = {name: byte_view(tensor) for name, tensor in batch.items()}
        self.read_into(shard, index, views, 0)
        return {name: tensor[0] for name, tensor in batch.items()}


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """Return torch's dtype of a tensor."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype


def empty_tensors(
    specs: Mapping[str, TensorSpec], count: int, *, pin_memory: bool = False
) -> dict[str, Tensor]:
    """Return uninitialised CPU tensors [B, ...] for a batch of `count` records, by name."""
    return {
        name: torch.empty((count, *spec.shape), dtype=torch_dtype(spec), pin_memory=pin_memory)
        for name, spec in specs.items()
    }


def byte_view(batch: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous CPU tensor [B, ...] as bytes, [B, bytes of one]."""
    view: NDArray[np.uint8] = batch.reshape(len(batch), -1).view(torch.uint8).numpy()
    return view
