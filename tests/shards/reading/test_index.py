"""Packed indexes: what sidecars say, parsed once whatever the size of the cache."""

import errno
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ShardError
from shards.format import sidecar
from shards.format.records import Record
from shards.format.writer import write_shard
from shards.reading import reader
from shards.reading.cache import Cache
from shards.reading.index import PackedIndexes, ShardIndex, pack


def test_keys_of_several_lengths(tmp_path: Path) -> None:
    short, long = "000001-00002-0123456789abcdef", "1000000-00002-0123456789abcdef"
    prompts = [[short, long], [short]]
    records = [Record(f"000000-{slot:05d}-0123456789abcdef", {}, {}) for slot in range(2)]
    index = ShardIndex(pack(write_shard(tmp_path, 0, records, fingerprint="f", prompts=prompts)))
    assert [index.prompts(at) for at in range(2)] == prompts
    assert index.shards_of_prompts() == {1, 1_000_000}


@pytest.mark.parametrize("folder", ["latents", "conditioning/conditioning", "text"])
def test_an_index_says_what_the_sidecar_says(folder: str, cache: Path) -> None:
    found = sidecar.load_present(cache / folder, 1)
    index = ShardIndex(pack(found))
    assert index.num_records == len(found.keys) > 1
    for at, (key, span, sums) in enumerate(
        zip(found.keys, found.spans, found.checksums, strict=True)
    ):
        assert (index.key(at), index.find(key)) == (key, at)
        assert [*index.tensors(at)[:2], *index.metadata(at)[:2]] == span
        assert f"{index.tensors(at).checksum:016x}{index.metadata(at).checksum:016x}" == sums
        assert index.prompts(at) == (found.prompts[at] if found.prompts else [])
    assert bool(index.shards_of_prompts()) is (folder == "latents")


def test_each_sidecar_is_parsed_once(
    bucketed: Path, parsed: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Cache(bucketed)
    places = list(whole.conditioning.locations()) * 2
    expected = {place: whole.sample(*place) for place in places}
    assert len({shard for shard, _ in places}) > 3

    parsed.clear()
    monkeypatch.setattr(reader, "INDEXED_RECORDS", 1)  # two indexes are in memory at a time
    large = Cache(bucketed)
    order = torch.randperm(len(places), generator=torch.manual_seed(0)).tolist()
    for at in order:
        key, tensors, prompts = large.sample(*places[at])
        assert (key, prompts) == (expected[places[at]][0], expected[places[at]][2])
        assert all(
            torch.equal(tensors[name], value) for name, value in expected[places[at]][1].items()
        )
    assert {*parsed.values()} == {1}
    assert len(parsed) >= 2 * len({shard for shard, _ in places})


def test_threads_may_add_and_find_at_once() -> None:
    packed = PackedIndexes()

    def add_and_find(shard: int) -> bool:
        data = bytes([shard]) * (1000 + shard)
        packed.add(shard, data)
        return packed.find(shard) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(add_and_find, range(200)))
    assert all(packed.find(shard) == bytes([shard]) * (1000 + shard) for shard in range(200))
    assert packed.find(200) is None


def test_without_room_it_is_said_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ShardError, match=r"No space left on device.*; set TMPDIR to a folder"):
        PackedIndexes().add(0, b"data")


def test_writing_in_parts_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: original(file, data[:7], at))
    packed = PackedIndexes()
    packed.add(3, bytes(range(100)))
    assert packed.find(3) == bytes(range(100))
