"""Precompute on disks that fail or fill up: nothing finished is lost, nothing read for nothing."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigError, RunError, ShardError
from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import DigestCache
from precompute.planning.prepare import prepare
from precompute.run import precompute
from precompute.sources import patient_read
from precompute.sources.files.listed import Listed
from precompute.sources.open_source import open_source
from shards.format import manifest, product
from shards.format.product import MANIFEST_BYTES_A_SHARD, Product
from shards.format.sidecar import SIDECAR_BYTES_A_PROMPT, SIDECAR_BYTES_A_RECORD
from shards.remote.folder import RemoteFolder
from shards.remote.transfer import pull
from tests.conftest import NUM_ROWS
from tests.hub_server import serve_in_thread
from tests.precompute.test_again import Encoded, again, encoded, repaint, tars  # noqa: F401

Reads = Counter[tuple[int, str]]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """How often each image is read."""
    found: Reads = Counter()
    original = Listed.read

    def counting(folder: Listed, index: int, kind: Any) -> bytes:
        found[index, kind] += 1
        return original(folder, index, kind)

    monkeypatch.setattr(Listed, "read", counting)
    return found


@pytest.fixture
def serve_folder() -> Iterator[Callable[[Path], str]]:
    """Serve a folder on this machine; return its address."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path) -> str:
            handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            serve_in_thread(server)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield serve


def settle(config: PrecomputeConfig) -> None:
    """Let the source's files be old enough for their times to tell of changes."""
    for path in Path(str(config.source)).rglob("*.png"):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"random_flip": True}, marks=pytest.mark.slow),
        {"conditioning_from": "canny", "random_flip": True},
    ],
    ids=["plain", "mirrored", "mirrored and drawn"],
)
def test_every_image_is_read_once_for_all_that_is_done_with_it(
    fresh: PrecomputeConfig, reads: Reads, settings: dict[str, Any]
) -> None:
    precompute(replace(fresh, **settings))
    kinds = ["image"] if "conditioning_from" in settings else ["image", "conditioning_image"]
    assert reads == {(row, kind): 1 for row in range(NUM_ROWS) for kind in kinds}


@pytest.mark.slow
def test_images_that_do_not_fit_the_memory_are_read_again(
    fresh: PrecomputeConfig, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(replace(fresh, random_flip=True))
    expected = tars(fresh)
    shutil.rmtree(fresh.cache)
    reads.clear()
    monkeypatch.setattr("precompute.sources.kept_images.KEPT_BYTES", 0)
    precompute(replace(fresh, random_flip=True))
    # To hash it, to encode it and its mirror, which a batch holds both, and to look at it.
    times = {"image": 2, "conditioning_image": 3}
    assert all(count == times[kind] for (_, kind), count in reads.items())
    assert tars(fresh) == expected


def test_a_file_edited_during_a_run_leaves_the_other_digests(
    fresh: PrecomputeConfig,
    circles: Path,
    tmp_path: Path,
    reads: Reads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(fresh, source=str(shutil.copytree(circles, tmp_path / "source")))
    settle(config)
    monkeypatch.setattr("precompute.sources.file_versions.SETTLED_NS", 0)
    monkeypatch.setattr("precompute.sources.kept_images.KEPT_BYTES", 0)
    edited = tmp_path / "source" / "target" / "9.png"
    counting = Listed.read

    def editing(folder: Listed, index: int, kind: Any) -> bytes:
        data = counting(folder, index, kind)
        if (index, kind) == (9, "image"):
            repaint(config, "target/9.png")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(Listed, "read", editing)
        with pytest.raises(ShardError, match=r"target/9\.png was changed while precompute was"):
            precompute(config)
    # The same times and size, though other bytes: only then the digest itself was wrong.
    source = open_source(config.source_settings())
    versions = [source.version(row, "image") for row in range(NUM_ROWS)]
    known = DigestCache(config.cache / "hashes.npy").find(versions)
    assert [row for row, content in enumerate(known) if content is None] == [9]
    reads.clear()
    precompute(config)
    times = {"image": 1, "conditioning_image": 2}  # once to look at it
    more = {key: count for key, count in reads.items() if key[0] < 8 and count > times[key[1]]}
    assert more == {}
    assert reads[9, "image"] == 2
    assert edited.exists()


def test_room_that_a_run_makes_itself_is_not_asked_for(
    again: PrecomputeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smaller = replace(again, resolution=48)
    context = prepare(smaller)
    old = {path: path.stat().st_size for path in again.cache.rglob("*.tar")}
    shards = [
        (plan, shard)
        for folder, plan in context.products_by_folder().items()
        for shard in range(plan.num_shards)
        if folder != "text"
    ]
    new = [plan.shard_bytes(plan.shard(shard)) for plan, shard in shards]
    replaced = [old[plan.folder / f"{shard:06d}.tar"] for plan, shard in shards]
    # Each new shard is written beside the old one, which then goes.
    lines = [sum(new[: at + 1]) - sum(replaced[:at]) for at in range(len(new))]
    assert context.bytes_needed() == max(lines) < sum(new)
    needed = context.bytes_needed()
    usage, room = shutil.disk_usage(again.cache), {"at the start": needed - 1}

    def disk_usage(_: Path) -> Any:
        taken = sum(path.stat().st_size for path in again.cache.rglob("*.tar*"))
        return usage._replace(free=room["at the start"] + sum(old.values()) - taken)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(OSError, match="space"):
        precompute(smaller)
    room["at the start"] = needed + 10_240 * len(new)  # what tars may be rounded up by
    assert room["at the start"] < sum(new)
    precompute(smaller)
    assert manifest.load(again.cache).latents.num_records == NUM_ROWS


@pytest.mark.parametrize(
    "number",
    [
        errno.EIO,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (errno.ESTALE, errno.ETIMEDOUT)),
    ],
)
def test_a_disk_that_fails_now_and_then_costs_no_record(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    before = tars(again)
    original, failures = Listed.read, Counter[int]()

    def failing(folder: Listed, index: int, kind: Any) -> bytes:
        failures[index] += 1
        if index in (2, 9) and failures[index] <= 2:
            raise OSError(number, os.strerror(number))
        return original(folder, index, kind)

    monkeypatch.setattr(patient_read, "WAITS_S", (0.0, 0.0))
    monkeypatch.setattr(Listed, "read", failing)
    (again.cache / "hashes.npy").unlink(missing_ok=True)
    precompute(replace(again, strict=True))
    assert failures[2] > 2
    assert encoded.taken() == {}
    assert tars(again) == before


@pytest.mark.slow
def test_a_disk_that_is_broken_ends_the_run_and_keeps_the_cache(
    again: PrecomputeConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tars(again)

    def failing(folder: Listed, index: int, kind: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(patient_read, "WAITS_S", (0.0,))
    monkeypatch.setattr(Listed, "read", failing)
    (again.cache / "hashes.npy").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"line \d+, target/.*: Input/output error, 2 times"):
        precompute(replace(again, max_bad_fraction=1.0))
    assert tars(again) == before
    assert manifest.load(again.cache).num_skipped == 0


@pytest.mark.slow
def test_a_pulled_cache_has_no_plan_of_another(
    again: PrecomputeConfig,  # noqa: F811
    encoded: Encoded,  # noqa: F811
    cache: Path,
    serve_folder: Callable[[Path], str],
) -> None:
    precompute(replace(again, resolution=48))
    encoded.taken()
    pull(RemoteFolder(serve_folder(cache)), again.cache, overwrite=True)
    assert not (again.cache / "plan.safetensors").exists()
    precompute(again)
    assert encoded.taken() == {}


def test_too_many_shards_are_refused_before_anything_is_encoded(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.planning.size_limits.MOST_SHARDS", 9)
    with pytest.raises(ConfigError, match=r"makes 11 shards, .* 9 at most; give --shard-mb 0\.05 "):
        prepare(fresh)
    monkeypatch.setattr("precompute.planning.size_limits.MOST_SHARDS", 11)
    prepare(fresh)


def test_a_shard_has_no_more_records_and_captions_than_a_sidecar_lists(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = prepare(replace(fresh, shard_mb=60_000_000.0))
    assert [int(count) for count in np.diff(context.products.text.layout.starts)] == [322_624]
    limit = 8 * SIDECAR_BYTES_A_RECORD + 8 * SIDECAR_BYTES_A_PROMPT  # eight rows of one caption
    monkeypatch.setattr("precompute.planning.size_limits.LARGEST_FILE_BYTES", limit)
    prepare(fresh)
    monkeypatch.setattr("precompute.planning.size_limits.LARGEST_FILE_BYTES", limit - 1)
    with pytest.raises(ConfigError, match=r"a shard of 8 records with 8 captions"):
        prepare(fresh)


def test_a_shard_takes_no_more_in_a_manifest_than_is_reckoned_with() -> None:
    count = 100
    large = Product(
        "f" * 32, 9_999_999 * count, [9_999_999] * count, [9_999_999_999_999] * count,
        ["f" * 64] * count, ["f" * 64] * count, [1023] * count,
    )  # fmt: skip
    nested = {"conditioning": {"name": dataclasses.asdict(large)}}
    empty = {"conditioning": {"name": dataclasses.asdict(product.product_of(Path(), []))}}
    sizes = [len(json.dumps(one, indent=1)) for one in (nested, empty)]
    assert (sizes[0] - sizes[1]) / count < MANIFEST_BYTES_A_SHARD
