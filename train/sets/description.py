"""A mix of sets in words."""

from collections.abc import Sequence

from shards.reading.mixed_order import MixedOrder
from train.sets.agreement import describe_encoders
from train.sets.overlap import describe_overlap
from train.sets.training_set import TrainingSet


def describe_mix(sets: Sequence[TrainingSet], order: MixedOrder) -> list[str]:
    """Return a line for each of several sets, and one on a pass over them; none for a single set.

    Args:
        sets: of the run.
        order: of their samples.
    """
    if len(sets) == 1:
        return []
    total = sum(one.weight for one in sets)
    lines = []
    for one in sets:
        span = "" if one.is_whole else "[{}:{}]".format(*one.records)
        lines.append(
            f"set {one.name}: {one.order.num_records} samples of {one.location}{span}, control "
            f"{one.cache.conditioning_name!r}, {one.weight / total:.1%} of the samples"
        )
    whole = f"an epoch is {order.start(1)} samples: then each of the sets has come at least once"
    encoders = describe_encoders(sets)
    return [*lines, whole, *([encoders] if encoders else []), *describe_overlap(sets)]
