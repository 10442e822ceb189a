"""Several remote caches in one run share the room on this machine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.synthetic import TINY, write_cache
from common.errors import ShardError
from tests.shards.remote.conftest import Server
from train.config import TrainConfig
from train.data import TrainingSamples
from train.sets.find import find_sets


def test_their_windows_must_have_room_together(
    train_config: TrainConfig, serve: Callable[[Path], Server], tmp_path: Path
) -> None:
    sizes, urls = [], []
    for number in range(2):
        cache = tmp_path / f"cache-{number}"
        write_cache(cache, TINY, num_shards=2, images_per_shard=4, seed=number)
        sizes.append(sum(path.stat().st_size for path in cache.rglob("*.tar")))
        urls.append(serve(cache).url)
    config = replace(
        train_config, cache=tuple(urls), local_cache_dir=tmp_path / "local", shuffle_window=1
    )

    def samples(room: int, count: int) -> TrainingSamples:
        given = replace(config, cache=config.cache[:count], local_cache_gb=room / 1e9)
        sets, order = find_sets(given, 1)
        caches = [one.cache for one in sets]
        return TrainingSamples(caches, order, seed=0, proportion_empty_prompts=0.0)

    with samples(sum(sizes), 2).read_ahead(0), samples(max(sizes), 1).read_ahead(0):
        pass
    crowded = samples(sum(sizes) - 1, 2)
    with pytest.raises(ShardError, match="1 shards mixed at a time"), crowded.read_ahead(0):
        pass
