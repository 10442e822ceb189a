"""docs/shard-format.md is enough to write a reader: this one uses none of the package's code."""

import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from shards.format.manifest import load
from shards.reading.cache import Cache
from shards.reading.order import Order

# Numpy has no bfloat16; its bits will do.
DTYPES = {"U8": np.uint8, "F16": np.float16, "BF16": np.int16, "F32": np.float32}


class Page:
    """A cache, read as the page says."""

    def __init__(self, cache: Path, name: str) -> None:
        self.cache, self.name = cache, name
        data = (cache / "manifest.json").read_bytes()
        self.manifest = json.loads(data)
        digest = self.manifest["digest"].encode()
        assert hashlib.sha256(data.replace(digest, b"0" * 64, 1)).hexdigest() == digest.decode()
        assert self.manifest["format_version"] == 1

    def product(self, folder: str) -> dict[str, Any]:
        kind, _, name = folder.partition("/")
        return self.manifest[kind][name] if name else self.manifest[kind]

    def sidecar(self, folder: str, shard: int) -> dict[str, Any]:
        data = (self.cache / folder / f"{shard:06d}.json").read_bytes()
        expected = self.product(folder)["sidecar_sha256"][shard]
        assert hashlib.sha256(data).hexdigest() == expected
        return json.loads(data)

    def record(self, folder: str, shard: int, index: int) -> dict[str, np.ndarray]:
        sidecar = self.sidecar(folder, shard)
        offset, size, json_offset, json_size = sidecar["spans"][index]
        tar = (self.cache / folder / f"{shard:06d}.tar").read_bytes()
        assert hashlib.sha256(tar).hexdigest() == sidecar["sha256"]
        data, metadata = tar[offset : offset + size], tar[json_offset : json_offset + json_size]
        for part, digits in ((data, slice(16)), (metadata, slice(16, 32))):
            assert f"{xxhash.xxh3_64_intdigest(part):016x}" == sidecar["checksums"][index][digits]
        header_size = struct.unpack("<Q", data[:8])[0]
        body = data[8 + header_size :]
        found = {}
        for name, entry in json.loads(data[8 : 8 + header_size]).items():
            start, end = entry["data_offsets"]
            values = np.frombuffer(body[start:end], DTYPES[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
        return found

    def find(self, folder: str, key: str) -> tuple[int, int]:
        assert re.fullmatch(r"[0-9]{6,9}-[0-9]{5,9}-[0-9a-f]{16}", key)
        shard = int(key.split("-")[0])
        return shard, self.sidecar(folder, shard)["keys"].index(key)

    def order(self, seed: int, window: int | None, group: int) -> Iterator[tuple[int, int]]:
        """Yield the samples of places 0, 1, 2, …"""
        product = self.product(f"conditioning/{self.name}")
        held_out = self.manifest.get("held_out", [])
        sizes = [0 if k in held_out else n for k, n in enumerate(product["shard_records"])]
        return page_order(sizes, product["shard_buckets"], seed, window, group)


def page_order(
    sizes: Sequence[int], shard_buckets: Sequence[int], seed: int, window: int | None, group: int
) -> Iterator[tuple[int, int]]:
    """Yield the samples of places 0, 1, 2, …, as the page says."""
    taking_part = [shard for shard, size in enumerate(sizes) if size]
    buckets = {shard: shard_buckets[shard] for shard in taking_part}
    w = window or len(taking_part)
    for epoch in itertools.count():

        def key(*numbers: int, epoch: int = epoch) -> int:
            return xxh("/".join(map(str, (seed, epoch, *numbers))))

        shards = sorted(taking_part, key=lambda shard: xxh(str(shard), key(0)))
        for b in range(math.ceil(len(shards) / w)):
            mixed = shards[b * w : (b + 1) * w]
            samples = [(k, i) for k in mixed for i in range(sizes[k])]
            if len(set(buckets.values())) == 1:
                for q in range(len(samples)):
                    yield samples[feistel(q, len(samples), key(b + 1))]
                continue
            groups = []
            for c in sorted(set(buckets.values())):
                of_c = [(k, i) for k, i in samples if buckets[k] == c]
                for j in range(math.ceil(len(of_c) / group)):
                    numbers = [(j * group + q) % len(of_c) for q in range(group)]
                    keyed = [feistel(q, len(of_c), key(b + 1, c)) for q in numbers]
                    groups.append([of_c[q] for q in keyed])
            for t in range(len(groups)):
                yield from groups[feistel(t, len(groups), key(b + 1))]


def page_mix(
    orders: Sequence[Iterator[tuple[int, int]]], weights: Sequence[int], group: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (set, shard, record) of places 0, 1, 2, …, as the page says."""

    def woven(sets: Sequence[int]) -> Iterator[int]:
        if len(sets) == 1:
            yield from itertools.repeat(sets[0])
        half = len(sets) // 2
        left, right = woven(sets[:half]), woven(sets[half:])
        w, v = (sum(weights[s] for s in part) for part in (sets[:half], sets))
        for t in itertools.count():
            taken = [math.floor(Fraction(w * u, v) + Fraction(v // 2, v)) for u in (t, t + 1)]
            yield next(left) if taken[1] > taken[0] else next(right)

    for number in woven(range(len(orders))):
        for _ in range(group):
            yield number, *next(orders[number])


def xxh(text: str, key: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("ascii"), seed=key)


def feistel(q: int, m: int, key: int) -> int:
    a = math.ceil(math.sqrt(m))
    c = math.ceil(m / a)
    while True:
        left, right = q % a, q // a
        for r in range(16):
            modulus = c if r % 2 else a
            left, right = right, (left + xxh(f"{r} {right}", key)) % modulus
        q = a * right + left
        if q < m:
            return q


@pytest.mark.parametrize("kind", ["cache", "held_out", "bucketed"])
def test_the_page_is_enough_to_read_every_sample(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    page, ours = Page(folder, "conditioning"), Cache(folder)
    product = page.product("conditioning/conditioning")
    for shard, count in enumerate(product["shard_records"]):
        grid = page.manifest["buckets"][product["shard_buckets"][shard]]
        for index in range(count):
            expected = ours.sample(shard, index)[1]
            key = page.sidecar("conditioning/conditioning", shard)["keys"][index]
            latent_shard, latent_index = page.find("latents", key)
            found = page.record("conditioning/conditioning", shard, index)
            found |= page.record("latents", latent_shard, latent_index)
            prompts = page.sidecar("latents", latent_shard)["prompts"][latent_index]
            found |= page.record("text", *page.find("text", prompts[0]))
            expected |= ours.embeddings(prompts[0])
            assert found.keys() == expected.keys()
            assert list(found["latent"].shape) == [16, *grid]
            for name, values in expected.items():
                bits = values.view(torch.int16) if values.dtype == torch.bfloat16 else values
                assert torch.equal(torch.from_numpy(found[name].copy()), bits)


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 1, 2, 3])
@pytest.mark.parametrize("kind", ["cache", "held_out", "bucketed"])
def test_the_page_is_enough_to_know_the_order(
    kind: str, window: int | None, group: int, request: pytest.FixtureRequest
) -> None:
    page = Page(request.getfixturevalue(kind), "conditioning")
    product = page.product("conditioning/conditioning")
    order = Order(
        load(page.cache).training_records("conditioning"),
        seed=7,
        window=window,
        shard_buckets=product["shard_buckets"],
        group=group,
    )
    expected = list(itertools.islice(page.order(7, window, group), 300))
    assert [order.record(place) for place in range(300)] == expected
