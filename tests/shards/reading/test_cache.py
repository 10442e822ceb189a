"""Reading what is rare: rows that lack a record, prompts that come twice, short reads."""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ShardError
from shards import verify
from shards.format import manifest, sidecar
from shards.format.members import Members
from shards.format.product import Product, captions_digest, product_of
from shards.format.tensor_spec import TensorSpec
from shards.format.writer import write_shard
from shards.reading import location
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles, OpenFile
from shards.reading.reader import ProductReader
from shards.reading.tensors import empty_tensors


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def loaded(folder: Path, shard: int = 0) -> sidecar.Sidecar:
    found = sidecar.load(folder, shard)
    assert found is not None
    return found


def leave_out_first(folder: Path, product: Product) -> Product:
    """Write a product's first shard without its first record; return the manifest's entry."""
    old, data = loaded(folder), sidecar.tar_path(folder, 0).read_bytes()
    members = [
        Members(key, data[start : start + size], data[at : at + length])
        for key, (start, size, at, length) in zip(old.keys, old.spans, strict=True)
    ]
    write_shard(folder, 0, members[1:], fingerprint=old.fingerprint, prompts=old.prompts[1:])
    sidecars = [loaded(folder, shard) for shard in range(product.num_shards)]
    return product_of(folder, sidecars, product.shard_buckets)


def test_a_row_without_a_conditioning_image_does_not_shift_the_others(
    cache: Path, copy: Path
) -> None:
    """Its control is the cache's second, beside one that has them all."""
    found = manifest.load(copy)
    for kind in ("conditioning", "validation"):
        shutil.copytree(copy / kind / "conditioning", copy / kind / "depth")
    depth = leave_out_first(copy / "conditioning" / "depth", found.conditioning["conditioning"])
    both = replace(
        found,
        conditioning=found.conditioning | {"depth": depth},
        conditioning_specs=dict.fromkeys(
            ("conditioning", "depth"), found.conditioning_specs["conditioning"]
        ),
        validation=dict.fromkeys(("conditioning", "depth"), found.validation["conditioning"]),
    )
    manifest.write(copy, both)
    whole, opened = Cache(cache), Cache(copy, "depth")
    keys = loaded(cache / "conditioning" / "conditioning").keys
    assert opened.conditioning.product.shard_records[0] == len(keys) - 1
    for index, key in enumerate(keys[1:]):
        found_key, tensors, prompts = opened.sample(0, index)
        expected_key, expected, expected_prompts = whole.sample(0, index + 1)
        assert found_key == expected_key == key
        assert prompts == expected_prompts
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_conditioning_image_without_its_image_is_listed(copy: Path) -> None:
    found = manifest.load(copy)
    key = loaded(copy / "latents").keys[0]
    latents = leave_out_first(copy / "latents", found.latents)
    captions = captions_digest(loaded(copy / "latents", k) for k in range(latents.num_shards))
    manifest.write(copy, replace(found, latents=latents, captions=captions))
    (fault,) = (fault for _, faults in verify.faults(copy) for fault in faults)
    assert f"no record '{key}' in latents/" in fault


def test_a_prompt_that_comes_twice_in_a_batch(bucketed: Path) -> None:
    found = Cache(bucketed)
    samples = [found.sample_records(shard, 1) for shard in (0, 3, 6)]
    prompts = [samples[0].prompts[0], samples[1].prompts[0], samples[0].prompts[0]]
    batch = empty_tensors(found.sample_specs(0), 3)
    for tensor in batch.values():
        tensor.fill_(7)
    found.read(batch, samples, prompts)
    for position, prompt in enumerate(prompts):
        for name, expected in found.embeddings(prompt).items():
            assert torch.equal(batch[name][position], expected)
    assert not torch.equal(batch["pooled_embeds"][0], batch["pooled_embeds"][1])


def safetensors_bytes(order: Sequence[str], values: dict[str, float]) -> bytes:
    """Two float32 numbers a tensor; the header names them by the alphabet, whatever the order."""
    at = {name: 8 * position for position, name in enumerate(order)}
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [2], "data_offsets": [at[name], at[name] + 8]}
            for name in sorted(order)
        }
    ).encode()
    data = b"".join(struct.pack("<2f", values[name], values[name]) for name in order)
    return struct.pack("<Q", len(header)) + header + data


def test_records_whose_tensors_lie_in_another_order(tmp_path: Path) -> None:
    orders = (("one", "two"), ("two", "one"), ("one", "two"))
    values = [{"one": 10.0 * k + 1, "two": 10.0 * k + 2} for k in range(3)]
    written = [
        Members(f"000000-{k:05d}-{k:016x}", safetensors_bytes(order, values[k]), b"{}")
        for k, order in enumerate(orders)
    ]
    assert len({len(members.tensors) for members in written}) == 1
    product = product_of(
        tmp_path / "text", [write_shard(tmp_path / "text", 0, written, fingerprint="f")]
    )
    specs = {name: TensorSpec((2,), "float32") for name in ("one", "two")}
    reader = ProductReader(LocalFiles(tmp_path), "text", product, [specs])
    for index in (0, 1, 2, 1, 0):
        found = reader.tensor_bytes(0, index)
        assert {name: data.view("<f4").tolist() for name, data in found.items()} == {
            name: [value, value] for name, value in values[index].items()
        }


def test_a_read_that_is_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(100))
    (tmp_path / "file").write_bytes(data)
    original = os.preadv

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        return original(descriptor, [memoryview(buffers[0])[:7]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    first, second = bytearray(10), np.zeros(30, np.uint8)
    assert OpenFile(tmp_path / "file").read_into([first, second], 20, 40) == 40
    assert bytes(first) + second.tobytes() == data[20:60]
    assert OpenFile(tmp_path / "file").read_into([first, second], 90, 40) == 10


def test_a_tar_that_grew_is_noticed_when_a_cache_is_opened(copy: Path) -> None:
    path = copy / "latents" / "000001.tar"
    size = path.stat().st_size
    os.truncate(path, size + 512)
    with pytest.raises(ShardError, match=rf"cut short or changed, {size} bytes expected"):
        Cache(copy)


def test_few_files_are_open_at_a_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(location, "OPEN_FILES", 2)
    files = LocalFiles(cache)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for shard in range(5):
        files.tar("text", shard)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 2


def test_a_reference_behind_the_last_shard_is_named(cache: Path) -> None:
    text = Cache(cache).text
    with pytest.raises(ShardError, match=r"no record .* run precompute again"):
        text.locate(f"{text.product.num_shards:06d}-00000-0123456789abcdef")
