"""A run is resumed on the data that it began with; what has changed is told in words."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.format import manifest
from shards.format.manifest import Manifest, data_digest
from tests.precompute.test_again import again, edit  # noqa: F401
from train.compatibility import check_same_order
from train.config import TrainConfig
from train.run import train
from train.saving.checkpoints import TrainState


def state(found: Manifest, **fingerprints: str) -> TrainState:
    """The state of a run on a cache, some of whose digests are replaced."""
    return TrainState(
        step=1,
        place=1,
        seed=0,
        shuffle_window=1,
        bucket_group=1,
        fingerprints=found.fingerprints("conditioning") | fingerprints,
    )


def refusal(found: Manifest, saved: TrainState, changes: Any = None) -> str:
    if changes is not None:
        found = replace(found, made_by=found.made_by | {"changes": changes})
    with pytest.raises(ConfigError) as raised:
        check_same_order(Path("checkpoint-1"), saved, state(found), [found])
    return str(raised.value)


def test_a_changed_cache_is_told_in_rows(
    again: PrecomputeConfig,  # noqa: F811
    train_config: TrainConfig,
) -> None:
    config = replace(
        train_config, cache=(str(again.cache),), checkpointing_steps=1, max_train_steps=1
    )
    train(config)
    edit(again, lambda rows: rows[3].update(prompt="another"))
    precompute(again)
    edit(again, lambda rows: rows.pop())
    precompute(again)
    resumed = replace(config, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError) as raised:
        train(resumed)
    told = "other captions, conditioning, latents, text: 1 caption changed; then 1 row fewer\n"
    assert f"the cache has {told}" in str(raised.value)
    assert not any(
        digest in str(raised.value)
        for digest in manifest.load(again.cache).fingerprints("conditioning").values()
    )


def test_changes_before_the_checkpoint_are_not_told(cache: Path) -> None:
    found = manifest.load(cache)
    saved = state(found, latents="0" * 32)
    changes = [
        {"since": "f" * 32, "what": "earlier"},
        {"since": data_digest(saved.fingerprints), "what": "9 rows more"},
        {"since": "e" * 32, "what": "7 rows fewer"},
    ]
    assert "other latents: 9 rows more; then 7 rows fewer\n" in refusal(found, saved, changes)


@pytest.mark.parametrize("changes", [None, [], [{"since": "f" * 32, "what": "x"}], [{}], [3], 3])
def test_where_nobody_knows_what_changed_the_products_are_named(cache: Path, changes: Any) -> None:
    found = manifest.load(cache)
    said = refusal(found, state(found, captions="0" * 32), changes)
    assert "\n  the cache has other captions\n" in said


def test_another_order_is_told_beside_the_data(cache: Path) -> None:
    found = manifest.load(cache)
    said = refusal(found, replace(state(found, text="0" * 32), seed=5))
    assert "--seed" in said
    assert "the cache has other text" in said
    only_order = refusal(found, replace(state(found), seed=5))
    assert "--seed" in only_order
    assert "the cache has" not in only_order
