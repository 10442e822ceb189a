"""What a shard that is built again takes over from the one on disk: what is surely the same."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShardError
from precompute.encoding.shard_build import ShardBuild, prepare_build
from precompute.planning.plan import ProductPlan
from precompute.planning.products import distinct_prompts, plan_text
from shards.format import sidecar
from shards.format.members import Members, metadata_to_bytes
from shards.format.sidecar import Skipped
from tests.precompute.planning.test_plan import IDENTITY, KILOBYTE, SMALL_SHARD_MB, inventory

WORDS = ["", "a", "b"]


def metadata(item: int) -> dict[str, Any]:
    return {"prompt": WORDS[item]}


def record(build: ShardBuild, position: int) -> Members:
    tensors = b"tensors of " + WORDS[position].encode()
    return Members(build.keys[position], tensors, metadata_to_bytes(metadata(position)))


@pytest.fixture
def product(tmp_path: Path) -> ProductPlan:
    """One shard of three records, which is on disk."""
    prompts = distinct_prompts(inventory([["a"], ["b"]]))
    plan = plan_text(tmp_path, prompts, IDENTITY, KILOBYTE, SMALL_SHARD_MB)
    build = prepare_build(plan, 0, metadata)
    assert (build.kept, build.to_encode) == ({}, {0, 1, 2})
    build.write([record(build, position) for position in range(3)])
    return plan


def kept(build: ShardBuild, positions: Sequence[int] = (0, 1, 2)) -> list[Members]:
    assert build.kept.keys() | build.to_encode == {0, 1, 2}
    assert not build.kept.keys() & build.to_encode
    return build.read_kept(positions)


def test_whole_records_are_taken_over(product: ProductPlan) -> None:
    build = prepare_build(product, 0, metadata)
    assert kept(build) == [record(build, position) for position in range(3)]
    assert kept(build, [1]) == [record(build, 1)]


def test_records_of_other_encoders_are_not(product: ProductPlan) -> None:
    assert kept(prepare_build(replace(product, identity={"encoder": "two"}), 0, metadata)) == []


def test_a_record_of_another_content_with_the_same_key_is_not(product: ProductPlan) -> None:
    # So is a conditioning latent known: by its image's key.
    def other(item: int) -> dict[str, Any]:
        return metadata(item) | ({"conditioning_hash": "new"} if item == 1 else {})

    build = prepare_build(product, 0, other)
    assert build.to_encode == {1}
    assert kept(build) == [record(build, 0), record(build, 2)]


@pytest.mark.parametrize("part", [0, 2], ids=["tensors", "metadata"])
def test_a_damaged_record_is_not(product: ProductPlan, part: int) -> None:
    card = sidecar.load(product.folder, 0)
    assert card is not None
    before = prepare_build(product, 0, metadata)
    path = sidecar.tar_path(product.folder, 0)
    data = bytearray(path.read_bytes())
    data[card.spans[1][part] + 3] ^= 1
    path.write_bytes(data)
    build = prepare_build(product, 0, metadata)
    assert build.to_encode == {1}
    with pytest.raises(ShardError, match="changed while precompute was running; run again"):
        kept(before)


def test_a_row_that_is_left_out_is_neither_kept_nor_encoded(product: ProductPlan) -> None:
    build = prepare_build(product, 0, metadata)
    build.leave_out(1)
    assert build.to_encode == set()
    assert build.read_kept([0, 1, 2]) == [record(build, 0), record(build, 2)]
    anew = prepare_build(replace(product, identity={"encoder": "two"}), 0, metadata)
    anew.leave_out(1)
    assert anew.to_encode == {0, 2}


def test_the_sidecar_says_what_was_left_out(product: ProductPlan) -> None:
    build = prepare_build(product, 0, metadata)
    build.leave_out(1)
    build.skipped[7] = Skipped("line 8", "broken")
    build.write(build.read_kept([0, 2]))
    card = sidecar.load(product.folder, 0)
    assert card is not None
    assert card.skipped == [Skipped("line 8", "broken")]
    assert (card.keys, card.prompts) == ([build.keys[0], build.keys[2]], [])
    assert (card.fingerprint, card.identity) == (product.fingerprints[0], product.identity_digest)
