"""What `verify` finds in records: numbers that are not finite."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from xxhash import xxh3_64_hexdigest

from shards import verify
from shards.format.tensor_spec import ITEM_BYTES
from tests.conftest import reseal


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_finite_agrees_with_torch_on_every_16_bit_pattern(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype="<u2")
    finite = torch.isfinite(torch.from_numpy(patterns).view(getattr(torch, dtype))).numpy()
    assert verify.all_finite(patterns[finite].view(np.uint8), dtype)
    for pattern in patterns[~finite]:
        data = np.array([0, pattern, 0], "<u2").view(np.uint8)
        assert not verify.all_finite(data, dtype), hex(pattern)


def test_all_finite_agrees_with_torch_on_float32() -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 1 << 16, dtype="<u4")
    patterns |= rng.choice(np.array([0, 0x7F800000], "<u4"), len(patterns))  # half not finite
    limits = np.array([0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 1], "<u4")
    patterns = np.concatenate([patterns, limits])
    finite = torch.isfinite(torch.from_numpy(patterns).view(torch.float32)).numpy()
    assert verify.all_finite(patterns[finite].view(np.uint8), "float32")
    for pattern in patterns[~finite][-1000:]:
        assert not verify.all_finite(np.array([pattern], "<u4").view(np.uint8), "float32")


def test_integers_are_finite() -> None:
    assert verify.all_finite(np.full(8, 255, np.uint8), "uint8")


@pytest.mark.parametrize(
    ("kind", "dtype", "number"),
    [("cache", "float32", 0x7FC00000), ("bucketed", "bfloat16", 0x7F80)],
)
def test_numbers_that_are_not_finite_are_listed(
    kind: str, dtype: str, number: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(request.getfixturevalue(kind), copy)
    tar, sidecar = copy / "latents" / "000001.tar", copy / "latents" / "000001.json"
    values = json.loads(sidecar.read_text())
    start, size, _, _ = values["spans"][0]
    data = bytearray(tar.read_bytes())
    end = start + size
    data[end - ITEM_BYTES[dtype] : end] = number.to_bytes(ITEM_BYTES[dtype], "little")
    tar.write_bytes(data)
    values["checksums"][0] = xxh3_64_hexdigest(data[start:end]) + values["checksums"][0][16:]
    values["sha256"] = hashlib.sha256(data).hexdigest()
    sidecar.write_text(json.dumps(values))
    reseal(copy)
    (fault,) = (fault for _, faults in verify.faults(copy) for fault in faults)
    assert fault == f"{tar}: record {values['keys'][0]}: latent holds numbers that are not finite"


@pytest.mark.parametrize("folder", ["text", "latents"])
def test_a_sidecar_that_is_missing_is_listed_once(cache: Path, folder: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    (copy / folder / "000001.json").unlink()
    (fault,) = (fault for _, faults in verify.faults(copy) for fault in faults)
    assert f"{folder}/000001.json" in fault or f"{copy / folder}" in fault
