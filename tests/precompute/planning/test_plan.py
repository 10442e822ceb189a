"""The plan of small sources: what a shard's fingerprint holds, what stays, and what is counted.

No encoder is needed for any of it.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from xxhash import xxh3_128_digest

from common.errors import ShardError
from precompute.fingerprints.digest_cache import UNKNOWN, Content, DigestCache
from precompute.planning.bad_rows import BadRows, faulty_rows, items_left_out
from precompute.planning.existing_layout import identities_in_use
from precompute.planning.inventory import Inventory, choose_rows, take_inventory
from precompute.planning.layout import Ids
from precompute.planning.plan import ProductPlan, bytes_needed
from precompute.planning.products import (
    distinct_prompts,
    image_contents,
    over_background,
    plan_conditioning,
    plan_latents,
    plan_text,
    records_per_shard,
    with_captions,
)
from precompute.planning.views.listing import list_views
from precompute.planning.views.random_crops import RandomCrops
from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings
from shards.format.json_files import digest
from shards.format.members import Members
from shards.format.sidecar import Skipped
from shards.format.tensor_spec import TensorSpec
from shards.format.writer import write_shard
from tests.precompute.test_bad_rows import write_lines

Settle = Callable[[Source], None]
IDENTITY = {"encoder": "one"}
KILOBYTE = {"latent": TensorSpec((1000,), "uint8")}
SMALL_SHARD_MB = 0.003  # three of them


def digests_of(*contents: str) -> Ids:
    data = b"".join(xxh3_128_digest(content.encode()) for content in contents)
    return np.frombuffer(data, ">u8").reshape(-1, 2).astype(np.uint64)


def inventory(captions: list[list[str]]) -> Inventory:
    """Rows with an image each and these captions."""
    count = len(captions)
    images = digests_of(*(f"image {row}" for row in range(count)))
    return Inventory(
        rows=np.arange(count),
        images=images,
        conditionings=images,
        sizes=np.ones((count, 2), np.int32),
        transparent=np.zeros((count, 2), bool),
        has_profile=np.zeros(count, bool),
        other_shape=np.zeros(count, bool),
        captions=digests_of(*(caption for row in captions for caption in row)),
        caption_ends=np.cumsum([0, *map(len, captions)]),
        faults={},
        conditioning_faults={},
    )


def contents_of(images: Ids, held_out: Any, num_crops: int = 1, *, mirrored: bool = False) -> Ids:
    views = list_views(held_out, num_crops, mirrored=mirrored)
    return image_contents(images, held_out, views, RandomCrops(0, 0.5, 1.0))


def latents_of(
    folder: Path, images: Ids, buckets: list[int] | None = None, held_out: list[int] | None = None
) -> ProductPlan:
    """The plan of latents of two buckets, in shards of three."""
    rows = np.isin(np.arange(len(images)), held_out or [])
    contents = contents_of(images, rows)
    places = np.array(buckets or [0] * len(images))
    return plan_latents(
        folder, contents, places, rows, IDENTITY, [KILOBYTE, KILOBYTE], SMALL_SHARD_MB
    )


def test_a_fingerprint_tells_of_encoders_and_of_all_contents(tmp_path: Path) -> None:
    images, controls = digests_of(*"abcd"), digests_of(*"efgh")
    latents = latents_of(tmp_path, images)
    conditioning = plan_conditioning(tmp_path, latents, controls, IDENTITY, [KILOBYTE, KILOBYTE])
    for product in (latents, conditioning):
        assert len(set(product.fingerprints)) == product.num_shards == 2
        other = replace(product, identity={"encoder": "two"})
        assert not set(other.fingerprints) & set(product.fingerprints)
        for column in range(product.contents.shape[1]):
            contents = product.contents.copy()
            contents[3, column] ^= np.uint64(1)
            first, second = replace(product, contents=contents).fingerprints
            assert first == product.fingerprints[0]
            assert second != product.fingerprints[1]
    assert conditioning.contents.shape == (4, 4)


def test_held_out_items_have_shards_of_their_own_in_their_bucket(tmp_path: Path) -> None:
    buckets = [0, 0, 1, 1, 0, 1, 0]
    plan = latents_of(tmp_path, digests_of(*"abcdefg"), buckets, held_out=[1, 5])
    found = {}
    for shard in range(plan.num_shards):
        made = plan.shard(shard)
        assert {buckets[item] for item in made.items} == {made.bucket}
        found[tuple(made.items.tolist())] = shard in plan.held_out
    assert found == {(0, 4, 6): False, (1,): True, (2, 3): False, (5,): True}


def test_an_item_is_another_one_when_it_is_held_out_or_mirrored() -> None:
    images = digests_of(*"abc")
    nothing, second = np.zeros(3, bool), np.array([False, True, False])
    plain, held_out = (contents_of(images, rows) for rows in (nothing, second))
    assert np.array_equal(plain, images)
    assert (held_out != plain).any(axis=1).tolist() == [False, True, False]
    pairs = contents_of(images, second, mirrored=True)
    assert np.array_equal(pairs[::2], held_out)
    assert len({tuple(pair) for pair in pairs.tolist()}) == 6


def test_the_background_counts_for_transparent_images_over_another_one() -> None:
    images, transparent = digests_of(*"abc"), np.array([False, True, False])
    white = {"background": [255, 255, 255]}
    for colour, expected in (
        ("white", [False, False, False]),
        ("#fff", [False, False, False]),
        ("black", [False, True, False]),
    ):
        found = over_background(images, transparent, white, colour)
        assert (found != images).any(axis=1).tolist() == expected
    black, red = (over_background(images, transparent, white, one) for one in ("black", "red"))
    assert (black != red).any()


def test_prompts_are_numbered_by_first_appearance_behind_the_empty_one(tmp_path: Path) -> None:
    rows = [["a"], ["b", "a"], [""], ["c", "b", "d"]]
    prompts = distinct_prompts(inventory(rows))
    assert np.array_equal(prompts.digests, digests_of("", "a", "b", "c", "d"))
    assert prompts.numbers.tolist() == [1, 2, 1, 0, 3, 2, 4]
    assert prompts.first.tolist() == [0, 1, 2, 5, 7]


@pytest.mark.parametrize(
    ("captions", "same"),
    [
        ([["a"], ["b", "c"], ["d"]], True),
        ([["b"], ["a", "c"], ["d"]], False),
        # The same captions in the same order, one of them on the row before.
        ([["a", "b"], ["c"], ["d"]], False),
        ([["a"], ["c", "b"], ["d"]], False),
        ([["a"], ["b", "c"], ["e"]], False),
    ],
)
def test_captions_that_change_or_move_are_noticed(
    tmp_path: Path, captions: list[list[str]], same: bool
) -> None:
    def planned(rows: list[list[str]]) -> ProductPlan:
        found = inventory(rows)
        prompts = distinct_prompts(found)
        text = plan_text(tmp_path, prompts, IDENTITY, KILOBYTE, SMALL_SHARD_MB)
        views = list_views(np.zeros(len(found), bool), 1, mirrored=False)
        return with_captions(latents_of(tmp_path, found.images), views, found, prompts, text)

    before, after = planned([["a"], ["b", "c"], ["d"]]), planned(captions)
    assert after.fingerprints == before.fingerprints
    assert (after.captions == before.captions) == same


def test_a_shard_holds_one_record_or_more_and_whole_batches() -> None:
    # Of 1,000 bytes each, without their headers.
    for shard_mb, count in ((0.0001, 1), (0.0635, 63), (0.0641, 64), (0.0999, 96), (0.13, 128)):
        assert records_per_shard(shard_mb, KILOBYTE) == count


def test_room_is_counted_shard_by_shard(tmp_path: Path) -> None:
    product = latents_of(tmp_path, digests_of(*"abcdefg"))
    assert product.num_shards == 3
    new = [product.shard_bytes(product.shard(shard)) for shard in range(3)]
    assert new == [3 * new[2], 3 * new[2], new[2]]
    shards = [(product, shard) for shard in range(3)]
    assert bytes_needed(shards) == sum(new)
    # The second new shard stands beside an old one twice as large, which then makes room.
    (tmp_path / "000001.tar").write_bytes(bytes(2 * new[1]))
    assert bytes_needed(shards) == new[0] + new[1]
    (tmp_path / "000001.tar").write_bytes(bytes(new[2] // 2))
    assert bytes_needed(shards) == sum(new) - new[2] // 2


def write_text_shard(product: ProductPlan, positions: list[int], fingerprint: str) -> None:
    plan = product.shard(0)
    records = [Members(plan.key(at, product.ids), b"tensors", b"{}") for at in positions]
    write_shard(
        product.folder, 0, records, fingerprint=fingerprint, identity=product.identity_digest
    )


def test_a_shard_is_finished_as_planned_and_lacks_what_was_left_out(tmp_path: Path) -> None:
    prompts = distinct_prompts(inventory([["a"], ["b"]]))
    text = plan_text(tmp_path, prompts, IDENTITY, KILOBYTE, SMALL_SHARD_MB)
    assert text.finished(0) is None
    write_text_shard(text, [0, 2], text.fingerprints[0])
    found = text.finished(0)
    assert found is not None
    assert found.identity == text.identity_digest
    assert items_left_out(text, 0) == [1]
    write_text_shard(text, [0, 1, 2], "f" * 32)
    assert text.finished(0) is None
    assert items_left_out(text, 0) == []


def test_the_form_of_an_identity_is_the_one_that_the_cache_has(tmp_path: Path) -> None:
    now, former = {"encoder": "one", "more": True}, IDENTITY
    prompts = distinct_prompts(inventory([["a"]]))
    for found, expected in (({"encoder": "two"}, now), (now, now), (former, former)):
        text = plan_text(tmp_path / "text", prompts, found, KILOBYTE, SMALL_SHARD_MB)
        write_text_shard(text, [0], text.fingerprints[0])
        assert text.identity_digest == digest(found)
        assert identities_in_use(tmp_path, {"text": (now, former)}) == [expected]
    assert identities_in_use(tmp_path / "nowhere", {"text": (now, former)}) == [now]


def test_rows_are_chosen_by_seed_and_more_of_them_keep_those() -> None:
    chosen = [set(choose_rows(100, limit, seed=7)) for limit in (10, 30, 100)]
    assert [len(rows) for rows in chosen] == [10, 30, 100]
    assert chosen[0] < chosen[1] < chosen[2]
    assert set(choose_rows(100, 30, seed=8)) != chosen[1]
    assert list(choose_rows(100, 30, seed=7)) == sorted(chosen[1])
    assert list(choose_rows(5, None, seed=7)) == [0, 1, 2, 3, 4]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Three rows: the second has a transparent image, the third a transparent conditioning one."""
    folder = tmp_path / "source"
    folder.mkdir()
    rows = []
    for number in range(3):
        row = {"source": f"{number}c.png", "target": f"{number}.png", "prompt": f"row {number}"}
        rows.append(row)
        for kind, transparent in (("target", number == 1), ("source", number == 2)):
            mode = "RGBA" if transparent else "RGB"
            Image.new(mode, (10 + number, 20), (9, 9, number)).save(folder / row[kind])
    write_lines(folder, rows)
    return open_source(SourceSettings(source=str(folder)))


def taken(source: Source, digests: DigestCache) -> Inventory:
    rows = range(len(source))
    return take_inventory(source, rows, digests, conditioning=True, transparency=True)


def test_an_inventory_tells_sizes_and_which_images_are_transparent(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.sources.file_versions.SETTLED_NS", 0)
    transparent = [[False, False], [True, False], [False, True]]
    digests = DigestCache(tmp_path / "hashes.npy")
    found = taken(source, digests)
    assert found.sizes.tolist() == [[10, 20], [11, 20], [12, 20]]
    assert found.transparent.tolist() == transparent
    files = [f"{row}{kind}.png" for kind in ("", "c") for row in range(3)]
    read = [xxh3_128_digest((tmp_path / "source" / name).read_bytes()).hex() for name in files]
    columns = [*found.images.tolist(), *found.conditionings.tolist()]
    assert [f"{high:016x}{low:016x}" for high, low in columns] == read

    # A former version did not look whether they are.
    for name in files:
        os.utime(tmp_path / "source" / name, (1e9, 1e9))
    for row in range(3):
        for kind in ("image", "conditioning_image"):
            digest_of_it = xxh3_128_digest(source.read(row, kind))
            content = Content(digest_of_it, 10 + row, 20, UNKNOWN)
            digests.add(source.version(row, kind), content)
    assert taken(source, digests).transparent.tolist() == transparent


def test_files_that_are_missing_are_known_before_the_run(source: Source, tmp_path: Path) -> None:
    for name in ("0.png", "2c.png"):
        (tmp_path / "source" / name).unlink()
    found = taken(source, DigestCache(tmp_path / "hashes.npy"))
    assert (set(found.faults), set(found.conditioning_faults)) == ({0}, {2})
    assert faulty_rows(source, found) == {
        0: Skipped("line 1, 0.png", "0.png: No such file or directory"),
        2: Skipped("line 3, 2.png", "2c.png: No such file or directory"),
    }


def test_bad_rows_are_judged_all_together() -> None:
    bad = BadRows(100, 0.02)
    first, second = (
        {row: Skipped(f"line {row}", "broken") for row in rows} for rows in ((1, 4), (4, 9))
    )
    bad.add(first)
    with pytest.raises(ShardError, match="3 of 100 rows cannot be used"):
        bad.add(second)


@pytest.mark.parametrize(
    ("row", "wording"),
    [
        ({"target": "none.png", "prompt": "a"}, "none.png: No such file or directory"),
        ({"target": "a b.png ", "prompt": "a"}, "a b.png : No such file or directory"),
        ({"target": "none.png", "prompt": None}, "the prompt is not text but NoneType"),
        ({"prompt": "a"}, "the row has no image"),
    ],
)
def test_a_bad_row_is_known_by_the_first_wording_of_its_fault(
    tmp_path: Path, row: dict[str, Any], wording: str
) -> None:
    """Caches of former versions know it so, and keep its place."""
    (tmp_path / "source").mkdir()
    write_lines(tmp_path / "source", [row | {"source": "a.png"}, {"target": "a.png"}])
    source = open_source(SourceSettings(source=str(tmp_path / "source")))
    found = taken(source, DigestCache(tmp_path / "hashes.npy"))
    expected = xxh3_128_digest(f"cannot be used: {wording}".encode())
    assert b"".join(int(half).to_bytes(8, "big") for half in found.images[0]) == expected
