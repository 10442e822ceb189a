"""Records as bytes, and the headers that tell of them."""

import pytest
import safetensors.torch
import torch

from shards.format.members import metadata_to_bytes
from shards.format.records import Record, to_members
from shards.format.tensor_spec import TensorSpec, tensor_order

KEY = "000000-00000-0123456789abcdef"


def test_a_view_is_written_as_what_it_shows() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    members = to_members(Record(KEY, {"latent": values.T}, {}))
    assert safetensors.torch.load(members.tensors)["latent"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_order_of_metadata_does_not_count() -> None:
    one, other = {"a": 1, "b": [2]}, {"b": [2], "a": 1}
    assert list(one) != list(other)
    assert metadata_to_bytes(one) == metadata_to_bytes(other) == b'{"a": 1, "b": [2]}'


def test_shape_and_dtype_are_each_compared() -> None:
    data = safetensors.torch.save({"latent": torch.zeros(2, 3, dtype=torch.bfloat16)})
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert tensor_order(header, {"latent": TensorSpec((2, 3), "bfloat16")}) == ("latent",)
    for shape, dtype in (((2, 3), "float16"), ((3, 2), "bfloat16"), ((6,), "bfloat16")):
        with pytest.raises(ValueError, match=r"latent expected .*, found \[2, 3\] bfloat16"):
            tensor_order(header, {"latent": TensorSpec(shape, dtype)})
