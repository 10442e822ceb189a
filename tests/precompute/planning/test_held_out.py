"""Rows held out of training: which they are, where they stand, and that training leaves them."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.planning.held_out import held_out_rows
from precompute.planning.inventory import Inventory
from precompute.run import precompute
from shards.format import manifest
from shards.reading.cache import Cache
from shards.reading.order import Order
from shards.reading.reader import ProductReader
from tests.conftest import NUM_ROWS, Outcome, flags
from train.config import TrainConfig
from train.inputs import find_inputs


def inventory(images: list[int], faults: tuple[int, ...] = ()) -> Inventory:
    count = len(images)
    digests = np.random.default_rng(0).integers(1 << 63, size=(100, 2), dtype=np.uint64)[images]
    numbers = np.arange(count)
    return Inventory(
        rows=numbers,
        images=digests,
        conditionings=digests,
        sizes=np.ones((count, 2), np.int32),
        transparent=np.zeros((count, 2), bool),
        has_profile=np.zeros(count, bool),
        other_shape=np.zeros(count, bool),
        captions=digests,
        caption_ends=np.arange(count + 1),
        faults=dict.fromkeys(faults, "broken"),
        conditioning_faults={},
    )


def abouts(cache: Path, product: str) -> dict[str, list[str]]:
    """Return the image hashes of a product's records, held out or not."""
    found: dict[str, list[str]] = {"held out": [], "training": []}
    opened = Cache(cache)
    reader: ProductReader = getattr(opened, product)
    for shard, count in enumerate(reader.product.shard_records):
        kind = "held out" if shard in opened.manifest.held_out else "training"
        for index in range(count):
            about = reader.metadata(shard, index)
            assert about.get("held_out", False) == (kind == "held out")
            found[kind].append(str(about["image_hash"]))
    return found


def test_as_many_rows_as_wanted_are_held_out_and_more_keep_those() -> None:
    rows = inventory(list(range(50)))
    found = [held_out_rows(rows, wanted, seed=0) for wanted in range(50)]
    assert [int(mask.sum()) for mask in found] == list(range(50))
    for fewer, more in itertools.pairwise(found):
        assert (more >= fewer).all()
    assert (held_out_rows(rows, 10, seed=1) != found[10]).any()


def test_rows_that_are_added_or_removed_leave_the_choice_alone() -> None:
    before = held_out_rows(inventory(list(range(50))), 5, seed=0)
    after = held_out_rows(inventory(list(range(48))), 5, seed=0)
    # Those that are gone make room for as many others, and none of the rest changes sides.
    assert before[:48].sum() + (after & ~before[:48]).sum() == 5
    assert (after >= before[:48]).all()


def test_rows_of_one_image_are_held_out_together_and_broken_ones_never() -> None:
    rows = inventory([1, 2, 3, 1, 1, 4, 5], faults=(2,))
    for wanted in range(1, 4):
        found = held_out_rows(rows, wanted, seed=3)
        assert found.sum() >= wanted
        assert len(set(found[[0, 3, 4]])) == 1
        assert not found[2]


@pytest.mark.parametrize("wanted", [6, 7, 100])
def test_some_rows_must_be_left_to_train_on(wanted: int) -> None:
    with pytest.raises(ConfigError, match=f"--validation-rows {wanted}: the source has 6 usable"):
        held_out_rows(inventory([1, 2, 3, 4, 5, 6, 7], faults=(0,)), wanted, seed=0)


def test_held_out_rows_stand_in_shards_of_their_own(
    held_out: Path, circles: Path, command: Callable[..., Outcome]
) -> None:
    for product in ("latents", "conditioning"):
        found = abouts(held_out, product)
        assert len(found["held out"]) == 3
        files = [xxh3_128_hexdigest(path.read_bytes()) for path in circles.glob("target/*.png")]
        assert sorted(found["held out"] + found["training"]) == sorted(files)
    outcome = command("shards", "info", held_out)
    assert "held out of training: 3 images in" in outcome.output
    assert command("shards", "verify", held_out).exit_code == 0


def test_training_never_sees_them(train_config: TrainConfig, held_out: Path) -> None:
    inputs = find_inputs(replace(train_config, cache=(str(held_out),)), num_processes=1)
    seen = [inputs.order.record(place)[1:] for place in range(2 * (NUM_ROWS - 3))]
    shards = {shard for shard, _ in seen}
    assert shards.isdisjoint(inputs.cache.manifest.held_out)
    assert len(set(seen[: NUM_ROWS - 3])) == NUM_ROWS - 3
    assert inputs.order.num_records == NUM_ROWS - 3


def test_shards_without_samples_take_no_place_in_a_window() -> None:
    sizes = [2, 0, 2, 0, 0, 2]
    with_gaps, without = Order(sizes, seed=1, window=2), Order([2, 2, 2], seed=1, window=3)
    ends = [end for end, _ in zip(with_gaps.windows(0), range(2), strict=False)]
    assert [(place, len(shards)) for place, shards in ends] == [(4, 2), (6, 1)]
    assert {with_gaps.record(place)[0] for place in range(6)} == {0, 2, 5}
    assert without.num_records == with_gaps.num_records == 6


def test_holding_out_others_leaves_the_rest_alone(
    held_out: Path, precompute_config: PrecomputeConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(held_out, cache)
    config = replace(precompute_config, cache=cache, posterior="mean_std")
    before = abouts(cache, "latents")
    for wanted in (4, 0):
        precompute(replace(config, validation_rows=wanted))
        found = abouts(cache, "latents")
        assert len(found["held out"]) == wanted
        assert sorted(map(sorted, found.values())) != sorted(map(sorted, before.values()))
        everything = found["held out"] + found["training"]
        assert sorted(everything) == sorted(before["held out"] + before["training"])
        if wanted:
            assert set(before["held out"]) < set(found["held out"])
    assert "held_out" not in json.dumps(Cache(cache).latents.metadata(0, 0))
    found = manifest.load(cache)
    assert sum(found.training_records("conditioning")) == NUM_ROWS


def test_a_copied_cache_without_its_plan_keeps_its_shards(
    held_out: Path, precompute_config: PrecomputeConfig, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(held_out, cache)
    (cache / "plan.safetensors").unlink()
    before = {path.name: path.stat().st_ino for path in cache.glob("latents/*.tar")}
    precompute(replace(precompute_config, cache=cache, posterior="mean_std", validation_rows=3))
    assert {path.name: path.stat().st_ino for path in cache.glob("latents/*.tar")} == before
    assert manifest.load(cache) == manifest.load(held_out)


def test_mirrors_of_held_out_rows_are_held_out(fresh: PrecomputeConfig, circles: Path) -> None:
    precompute(replace(fresh, validation_rows=2, random_flip=True))
    assert sorted(abouts(fresh.cache, "latents")["held out"])[::2] == sorted(
        set(abouts(fresh.cache, "latents")["held out"])
    )


def test_a_wrong_number_is_refused(
    fresh: PrecomputeConfig, command: Callable[..., Outcome]
) -> None:
    for wanted, reason in ((-1, "must be at least 0"), (10, "the source has 10 usable rows")):
        outcome = command("precompute", *flags(fresh), "--validation-rows", wanted)
        assert outcome.exit_code == 2
        assert f"--validation-rows {wanted}: {reason}" in outcome.output
