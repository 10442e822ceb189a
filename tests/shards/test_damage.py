"""Whatever happens to a cache's files, reading gives the right tensors or a ShardError.

And `verify` lists a fault, unless the damage changed nothing that anybody reads.
"""

import contextlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ShardError
from shards import verify
from shards.reading.cache import Cache
from tests.conftest import reseal

HOSTILE = [-1, 0, 1, 1 << 31, 1 << 62, 10**30, 1.5, True, None, "", "..", "../../x", [], {}, [[]]]


def contents(folder: Path) -> list[dict[str, Tensor]]:
    """Return every tensor that training and validation would read."""
    cache = Cache(folder)
    found = [cache.empty_prompt()]
    for shard, count in enumerate(cache.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = cache.sample(shard, index)
            found += [tensors, *(cache.embeddings(prompt) for prompt in prompts)]
    for shard, count in enumerate(cache.validation.product.shard_records):
        found += [cache.validation.tensors(shard, index) for index in range(count)]
    return found


def same(read: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return len(read) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(read, right, strict=True)
    )


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.name != "run.json")


def flip(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "*.tar") + files(folder, "*.json"))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "*.tar") + files(folder, "*.json"))
    os.truncate(path, rng.randrange(path.stat().st_size))


def extend(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "*.tar") + files(folder, "*.json"))
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 512, 10240])))


def remove(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder, "*.tar") + files(folder, "*.json")).unlink()


def swap(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(files(folder, rng.choice(["*.tar", "*.json"])), 2)
    keep = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(keep)


def swap_pieces(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "*.tar"))
    data = bytearray(path.read_bytes())
    first, second = (512 * rng.randrange(len(data) // 512) for _ in range(2))
    data[first : first + 512], data[second : second + 512] = (
        data[second : second + 512],
        data[first : first + 512],
    )
    path.write_bytes(data)


def link(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "*.tar") + files(folder, "*.json"))
    target = rng.choice([Path("/dev/null"), folder, Path("/nowhere"), folder / "run.json"])
    path.unlink()
    path.symlink_to(target)


def hostile_header(folder: Path, rng: random.Random) -> None:
    """A record whose safetensors header claims another length, or is another."""
    path = rng.choice(files(folder, "*.tar"))
    document = json.loads(path.with_suffix(".json").read_text())
    if not document["spans"]:
        return
    start, size, _, _ = rng.choice(document["spans"])
    data = bytearray(path.read_bytes())
    length = rng.choice([0, 1, size, size * 2, (1 << 63) - 1, (1 << 64) - 1])
    data[start : start + 8] = struct.pack("<Q", length)
    path.write_bytes(data)


def edit(folder: Path, rng: random.Random) -> None:
    """Put something else in the place of a value somewhere in a JSON file, or drop a key."""
    path = rng.choice(files(folder, "*.json"))
    document = json.loads(path.read_text())
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        elif type(place[key]) is int and rng.random() < 0.5:
            place[key] += rng.choice([-512, -1, 1, 512])
        else:
            place[key] = rng.choice(HOSTILE)
        break
    path.write_text(json.dumps(document))


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flip,
    flip,
    truncate,
    extend,
    remove,
    swap,
    swap_pieces,
    link,
    hostile_header,
    edit,
    edit,
    edit,
]


def memory_mb(field: str) -> float:
    """Return what /proc says of this process's memory; 0 where there is no such thing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Reset VmHWM, the peak of resident memory, to the present value."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def check_damages(cache: Path, tmp_path: Path, seeds: range) -> dict[str, int]:
    """Damage a copy once for each seed; return how it came out, by outcome."""
    right = contents(cache)
    assert not [fault for _, found in verify.faults(cache) for fault in found]
    forget_peak()
    before = memory_mb("VmRSS")
    outcomes = {"refused": 0, "harmless": 0, "found by verify alone": 0}
    for seed in seeds:
        rng = random.Random(seed)
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(cache, copy)
        damage = rng.choice(DAMAGES)
        damage(copy, rng)
        if rng.random() < 0.5:  # as if written so: the digests above the damaged file are right
            with contextlib.suppress(LookupError, TypeError, ValueError, OSError):
                reseal(copy)
        try:
            read = contents(copy)
        except ShardError:
            read = None
        try:
            faults = [fault for _, found in verify.faults(copy) for fault in found]
        except ShardError as error:
            faults = [str(error)]
        where = f"seed {seed}, {damage.__name__}"
        assert memory_mb("VmHWM") - before < 64, f"{where}: takes memory"
        if read is None:
            assert faults, f"{where}: reading refuses what verify passes"
            outcomes["refused"] += 1
        else:
            assert same(read, right), f"{where}: other tensors"
            outcomes["found by verify alone" if faults else "harmless"] += 1
    return outcomes


@pytest.mark.parametrize("kind", ["cache", "bucketed"])
def test_damages_are_refused_found_or_harmless(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    outcomes = check_damages(request.getfixturevalue(kind), tmp_path, range(60))
    assert outcomes["refused"] > 10


@pytest.mark.slow
def test_a_thousand_damages(cache: Path, tmp_path: Path) -> None:
    outcomes = check_damages(cache, tmp_path, range(1000, 2000))
    assert outcomes["refused"] > 250
    assert outcomes["found by verify alone"] > 0
