"""Describing a cache from its manifest alone: lines for people, values for programs."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.format.json_files import plain
from shards.format.manifest import Manifest
from shards.format.sidecar import tar_path
from shards.format.specs import ConditioningSpec, describe_annotator


def describe(manifest: Manifest, *, by_shard: bool) -> Iterator[str]:
    """Yield lines on what a cache holds, what made it and how large it is."""
    for folder, product in manifest.products():
        yield (
            f"{folder:28s} {product.num_records:8d} records {product.num_shards:5d} shards "
            f"{product.num_bytes / 1e6:10.1f} MB   {product.fingerprint}"
        )
    yield from _describe_tensors(manifest)
    if manifest.held_out:
        images = sum(manifest.latents.shard_records[shard] for shard in manifest.held_out)
        yield f"held out of training: {images} images in {len(manifest.held_out)} shards"
    for name, spec in manifest.conditioning_specs.items():
        drawn = ""
        if annotator := manifest.annotators.get(name):
            drawn = f", drawn by {describe_annotator(annotator.name, annotator.arguments)}"
        pairs = num_pairs(manifest, name)
        yield f"conditioning {name!r}: {pairs}, {_made_from(spec)}{drawn}"
    yield f"rows skipped: {manifest.num_skipped}"
    for key, value in manifest.made_by.items():
        if key == "changes":
            yield from (f"changed: {change['what']}" for change in value)
        else:
            yield f"{key}: {value}"
    if by_shard:
        for shard in _shards(manifest):
            yield (
                f"{shard['shard']:36s} {shard['records']:8d} records "
                f"{shard['bytes'] / 1e6:10.1f} MB   sha256 {shard['sha256']}"
            )


def num_pairs(manifest: Manifest, name: str) -> str:
    """Return how many pairs of image and conditioning image a control has, in words."""
    records = manifest.conditioning[name].shard_records
    held_out = sum(records[shard] for shard in manifest.held_out)
    note = f" ({held_out} held out of training)" if held_out else ""
    return f"{sum(records)} pairs{note}"


def _made_from(spec: ConditioningSpec) -> str:
    parts = [f"pixels encoded in {spec.pixel_range}"]
    if spec.background is not None:
        parts.append("over #{:02x}{:02x}{:02x}".format(*spec.background))
    if spec.scale is not None:
        parts.append(f"scale {spec.scale}")
    return ", ".join(parts)


def _describe_tensors(manifest: Manifest) -> Iterator[str]:
    text, latent = manifest.text_spec, manifest.latent_spec
    t5 = f"T5 [{text.max_sequence_length}, {text.t5_width}]"
    if text.without_t5:
        t5 = f"no T5, zeros for its [{text.max_sequence_length}, {text.t5_width}]"
    yield (
        f"text: CLIP [{text.clip_tokens}, {text.clip_width}], {t5}, pooled [{text.pooled_width}], "
        f"{text.dtype}"
    )
    for (height, width), images in zip(manifest.buckets, manifest.bucket_records(), strict=True):
        count = f", {images} images" if len(manifest.buckets) > 1 else ""
        yield (
            f"latents: [{latent.latent_channels}, {height}, {width}]{count}, "
            f"posterior {latent.posterior}, {latent.dtype}"
        )


def summary(manifest: Manifest, *, by_shard: bool) -> dict[str, Any]:
    """Return what a cache holds, what made it and how large it is, as plain JSON values."""
    products = {
        folder: {
            "records": product.num_records,
            "shards": product.num_shards,
            "bytes": product.num_bytes,
            "fingerprint": product.fingerprint,
        }
        for folder, product in manifest.products()
    }
    return {
        "format_version": manifest.format_version,
        "products": products,
        "text_spec": dataclasses.asdict(manifest.text_spec),
        "buckets": [
            {"height": height, "width": width, "images": images}
            for (height, width), images in zip(
                manifest.buckets, manifest.bucket_records(), strict=True
            )
        ],
        "latent_spec": dataclasses.asdict(manifest.latent_spec),
        "conditioning_specs": {
            name: plain(spec) for name, spec in manifest.conditioning_specs.items()
        },
        "annotators": {
            name: dataclasses.asdict(spec) for name, spec in manifest.annotators.items()
        },
        "num_skipped": manifest.num_skipped,
        "made_by": manifest.made_by,
        **({"shards": _shards(manifest)} if by_shard else {}),
    }


def _shards(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "shard": tar_path(Path(folder), shard).as_posix(),
            "records": product.shard_records[shard],
            "bytes": product.shard_bytes[shard],
            "sha256": product.shard_sha256[shard],
        }
        for folder, product in manifest.products()
        for shard in range(product.num_shards)
    ]
