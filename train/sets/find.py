"""Finds the sets of samples that a run trains on, from its settings."""

from fractions import Fraction

from common.errors import ConfigError, ShardError
from shards.reading.cache import Cache
from shards.reading.mixed_order import MixedOrder, set_seed, whole_weights
from shards.reading.order import Order
from shards.remote.streaming import open_files
from train.config import TrainConfig
from train.sets.agreement import check_agreement
from train.sets.training_set import TrainingSet, in_range, parse_location, set_names


def find_sets(config: TrainConfig, step_samples: int) -> tuple[list[TrainingSet], MixedOrder]:
    """Return the sets that a run trains on, and the order of their samples.

    Args:
        config: of the run.
        step_samples: samples of an optimiser step, on all processes.

    Raises:
        ConfigError: the sets cannot be mixed, or a range has no records.
        ShardError: a cache is missing or incomplete, or has no samples.
    """
    numbers = _taken(config)
    caches = [_open(config, number) for number in numbers]
    locations = [parse_location(config.cache[number])[0] for number in numbers]
    names = set_names(locations, [cache.conditioning_name for cache in caches])
    spans = [_span(config.cache[each], cache) for each, cache in zip(numbers, caches, strict=True)]
    weights = whole_weights(
        [
            _weight(config, number, stop - start)
            for number, (start, stop) in zip(numbers, spans, strict=True)
        ]
    )
    sets = [
        TrainingSet(
            name=names[place],
            location=locations[place],
            records=spans[place],
            cache=cache,
            order=_order(config, cache, spans[place], place, step_samples),
            weight=weights[place],
        )
        for place, cache in enumerate(caches)
    ]
    check_agreement(sets)
    grids = {
        one.cache.manifest.buckets[one.order.buckets[shard]]
        for one in sets
        for shard in one.order.shards
    }
    group = step_samples if len(grids) > 1 else 1
    return sets, MixedOrder([one.order for one in sets], weights, group=group)


def open_caches(config: TrainConfig) -> list[Cache]:
    """Return the caches of the sets that a run trains on, opened.

    Raises:
        ShardError: one is missing or incomplete.
    """
    return [_open(config, number) for number in _taken(config)]


def _taken(config: TrainConfig) -> list[int]:
    """Return the numbers of the sets whose weight is not 0; the others are not looked at."""
    return [n for n in range(len(config.cache)) if not config.weights or config.weights[n] > 0]


def _open(config: TrainConfig, number: int) -> Cache:
    location, _ = parse_location(config.cache[number])
    controls = config.conditioning_name
    control = controls[number] if len(controls) > 1 else controls[0]
    return Cache(open_files(location, config.local_cache_dir, config.local_cache_gb), control)


def _span(text: str, cache: Cache) -> tuple[int, int]:
    """Return the first training record of a set and the one behind its last.

    Raises:
        ConfigError: there is none in the range.
        ShardError: the cache has none.
    """
    location, span = parse_location(text)
    count = sum(cache.manifest.training_records(cache.conditioning_name))
    if not count:
        raise ShardError(f"{location}: the cache holds no samples")
    start, stop, _ = span.indices(count)
    if start >= stop:
        raise ConfigError(
            f"--cache {text}: no records in this range; the cache has {count} to train on, 0 to "
            f"{count - 1}."
        )
    return start, stop


def _weight(config: TrainConfig, number: int, num_records: int) -> Fraction:
    """Return the weight of a set: as given, or each record's number of repeats."""
    if config.weights:
        # As it was written: 0.7 is seven tenths, and not what floating point makes of it.
        return Fraction(repr(config.weights[number]))
    return Fraction(num_records * (config.repeats[number] if config.repeats else 1))


def _order(
    config: TrainConfig, cache: Cache, span: tuple[int, int], place: int, step_samples: int
) -> Order:
    records, skipped = in_range(cache.manifest.training_records(cache.conditioning_name), *span)
    return Order(
        records,
        seed=set_seed(config.seed, place),
        window=config.shuffle_window,
        shard_buckets=cache.conditioning.product.shard_buckets,
        group=step_samples,
        skipped=skipped,
    )
