"""What a run's data are, for checkpoints: they go on with the same alone."""

from collections.abc import Mapping, Sequence

from train.sets.training_set import TrainingSet

OF_SET = " of set "


def data_fingerprints(sets: Sequence[TrainingSet]) -> dict[str, str]:
    """Return the digests of all that training reads, and what decides the order of several sets.

    Of one whole cache they are the manifest's own.
    """
    found: dict[str, str] = {}
    for number, one in enumerate(sets, 1):
        where = "" if len(sets) == 1 else f"{OF_SET}{number}"
        manifest = one.cache.manifest
        entries = manifest.fingerprints(one.cache.conditioning_name)
        if not one.is_whole:
            entries["range"] = "{}:{}".format(*one.records)
        if len(sets) > 1:
            entries["weight"] = str(one.weight)
        found |= {name + where: value for name, value in entries.items()}
    return found


def num_sets(fingerprints: Mapping[str, str]) -> int:
    """Return how many sets `data_fingerprints` described."""
    return len({name.partition(OF_SET)[2] for name in fingerprints})
