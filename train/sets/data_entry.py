"""What a ControlNet's configuration says of the data that it was trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sd3.images import WHITE
from sd3.value_scale import AS_IS
from shards.format.manifest import Manifest
from shards.format.specs import Bucket
from train.sets.training_set import TrainingSet


def data_entry(manifest: Manifest, conditioning_name: str) -> dict[str, Any]:
    """Return what inference needs to know about the data a ControlNet was trained on.

    `annotator` is there if one drew the conditioning images.
    `height` and `width` are those of the bucket nearest to a square, in pixels.
    """
    conditioning = manifest.conditioning_specs[conditioning_name]
    annotator = manifest.annotators.get(conditioning_name)
    return {
        "max_sequence_length": manifest.text_spec.max_sequence_length,
        "conditioning_range": conditioning.pixel_range,
        "background": conditioning.background or WHITE,
        "conditioning_scale": conditioning.scale or AS_IS,
        **_sizes(manifest.buckets, conditioning.vae_scale_factor),
        "latents_fingerprint": manifest.latents.fingerprint,
        "text_fingerprint": manifest.text.fingerprint,
        **({"t5": False} if manifest.text_spec.without_t5 else {}),
        **({"annotator": dataclasses.asdict(annotator)} if annotator else {}),
    }


def _sizes(buckets: Sequence[Bucket], factor: int) -> dict[str, Any]:
    sizes = [(height * factor, width * factor) for height, width in buckets]
    height, width = min(sizes, key=lambda size: max(size) / min(size))
    return {"height": height, "width": width, "buckets": sizes}


def _entry(one: TrainingSet) -> dict[str, Any]:
    """Return the entry of a set; `records`, first and behind the last, where it has a range."""
    entry = data_entry(one.cache.manifest, one.cache.conditioning_name)
    return entry if one.is_whole else entry | {"records": list(one.records)}


def mixed_entry(sets: Sequence[TrainingSet]) -> dict[str, Any]:
    """Return the entry of a ControlNet that is trained on sets; see `data_entry`.

    Of several sets it is the first one's, with the sizes of all; without `annotator` unless all
    controls are drawn alike. `mixed` then lists the sets, each with its share of the samples.
    """
    entries = [_entry(one) for one in sets]
    found = dict(entries[0])
    if len(sets) == 1:
        return found
    grids = dict.fromkeys(bucket for one in sets for bucket in one.cache.manifest.buckets)
    found |= _sizes(list(grids), sets[0].cache.conditioning_spec.vae_scale_factor)
    if any(entry.get("annotator") != found.get("annotator") for entry in entries):
        found.pop("annotator", None)
    found.pop("records", None)
    kept = ("records", "background", "conditioning_scale", "annotator", "latents_fingerprint")
    total = sum(one.weight for one in sets)
    found["mixed"] = [
        {
            "name": one.name,
            "control": one.cache.conditioning_name,
            "share": one.weight / total,
            "num_records": one.order.num_records,
            **{key: entry[key] for key in kept if key in entry},
        }
        for one, entry in zip(sets, entries, strict=True)
    ]
    return found
