"""Comparing a cache with its own manifest and sidecars, byte by byte."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import ShardError, os_error_line
from shards import tar_check
from shards.format import sidecar
from shards.format.manifest import SAMPLES, Manifest
from shards.format.product import Product, captions_digest, file_sha256
from shards.format.published import samples
from shards.format.sidecar import Sidecar
from shards.reading.location import LocalFiles
from shards.reading.reader import ProductReader

# Of a number format's bits, those of the exponent: all are set in infinities and NaN alone.
EXPONENT_BITS: dict[str, tuple[str, int]] = {
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F800000),
}


def faults(cache: Path) -> Iterator[tuple[str, list[str]]]:
    """Check every shard of a cache; yield (what was checked, its faults) as it is done.

    Checked are presence, size and sha256 of tars and sidecars, the sidecars against the tars' own
    headers, every record's checksums, shapes and dtypes, that its numbers are finite, that every
    prompt or image that a record refers to is there, and the sha256 of the index of samples. A
    fault is told once.

    Raises:
        ShardError: there is no manifest to check against.
    """
    files = LocalFiles(cache)
    manifest = files.manifest()
    readers = {
        folder: ProductReader(files, folder, product, manifest.specs_by_bucket(folder))
        for folder, product in manifest.products()
    }
    shards = [
        (folder, shard)
        for folder, product in manifest.products()
        for shard in range(product.num_shards)
    ]
    told: set[str] = set()
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda task: _shard_faults(cache, readers, *task), shards)
        for (folder, shard), shard_faults in zip(shards, results, strict=True):
            # A file that cannot be read is found anew by each record that refers to it.
            fresh = [fault for fault in dict.fromkeys(shard_faults) if fault not in told]
            told.update(fresh)
            yield f"{folder}/{shard:06d}", fresh
    yield "captions", _caption_faults(manifest, cache / "latents")
    yield SAMPLES, _index_faults(manifest, cache)


def num_steps(manifest: Manifest) -> int:
    """Return how often `faults` reports."""
    return num_shards(manifest) + 2


def num_shards(manifest: Manifest) -> int:
    """Return the number of shards that a cache has."""
    return sum(product.num_shards for _, product in manifest.products())


def all_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    """Tell whether numbers are finite: neither infinite nor NaN.

    Args:
        data: bytes of the numbers, little-endian, contiguous.
        dtype: one of `shards.format.tensor_spec.ITEM_BYTES`; integers are always finite.
    """
    if dtype not in EXPONENT_BITS:
        return True
    bits, exponent = EXPONENT_BITS[dtype]
    return not bool((data.view(bits) & exponent == exponent).any())


def _shard_faults(
    cache: Path, readers: dict[str, ProductReader], folder: str, shard: int
) -> list[str]:
    reader = readers[folder]
    try:
        tar_faults = _tar_faults(cache / folder, reader.product, shard)
        if tar_faults:
            return tar_faults
        reader.index(shard)  # compares the sidecar with the manifest
        loaded = sidecar.load(cache / folder, shard)
    except OSError as error:
        return [os_error_line(error)]
    except ShardError as error:
        return [str(error)]
    if loaded is None:
        return [f"{cache / folder}: the sidecar of shard {shard:06d} vanished"]
    return [
        *tar_check.faults(cache / folder, loaded),
        *_record_faults(reader, shard),
        *_reference_faults(readers, folder, loaded),
    ]


def _tar_faults(folder: Path, product: Product, shard: int) -> list[str]:
    path = sidecar.tar_path(folder, shard)
    size = path.stat().st_size
    if size != product.shard_bytes[shard]:
        return [f"{path}: {product.shard_bytes[shard]} bytes expected, found {size}"]
    if file_sha256(path) != product.shard_sha256[shard]:
        return [f"{path}: its sha256 is not the one in the manifest; the file has been changed"]
    return []


def _record_faults(reader: ProductReader, shard: int) -> Iterator[str]:
    specs = reader.specs[reader.bucket(shard)]
    has_prompt = "clip_embeds" in specs
    for index in range(reader.index(shard).num_records):
        try:
            metadata = reader.metadata(shard, index)
            if has_prompt and not isinstance(metadata.get("prompt"), str):
                yield f"{reader.describe(shard, index)}: its JSON holds no prompt"
            tensors = reader.tensor_bytes(shard, index)
        except ShardError as error:
            yield str(error)
            continue
        for name, data in tensors.items():
            if not all_finite(data, specs[name].dtype):
                yield f"{reader.describe(shard, index)}: {name} holds numbers that are not finite"


def _reference_faults(
    readers: dict[str, ProductReader], folder: str, shard: Sidecar
) -> Iterator[str]:
    """Yield the references of a shard's records to records that do not exist."""
    if folder == "latents":
        for key, prompts in zip(shard.keys, shard.prompts or [[]] * len(shard.keys), strict=True):
            if not prompts:
                yield f"{folder}/{shard.shard:06d}: {key} has no caption"
            yield from _dangling(readers["text"], prompts)
    elif folder.startswith("conditioning/"):
        yield from _dangling(readers["latents"], shard.keys)


def _dangling(reader: ProductReader, keys: list[str]) -> Iterator[str]:
    for key in keys:
        try:
            reader.locate(key)
        except ShardError as error:
            yield str(error)


def _caption_faults(manifest: Manifest, folder: Path) -> list[str]:
    shards = range(manifest.latents.num_shards)
    sidecars = (sidecar.load_present(folder, shard) for shard in shards)
    try:
        if captions_digest(sidecars) == manifest.captions:
            return []
    except (ShardError, OSError):
        return []  # reported with its shard
    return [f"{folder}: the sidecars' captions are not those the manifest was written for"]


def _index_faults(manifest: Manifest, cache: Path) -> list[str]:
    path = cache / SAMPLES
    if manifest.samples is None:
        return []  # of a former version
    if not path.is_file():
        found = "missing, though manifest.json counts on it"
    elif not samples.is_there(cache, manifest.samples):
        found = "its sha256 is not the one in the manifest; the file has been changed"
    else:
        return []
    return [f"{path}: {found}; python -m shards seal writes it anew"]
