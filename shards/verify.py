"""Holding a cache against its own manifest and sidecars, byte by byte."""

import hashlib
import itertools
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from shards import manifest, sidecar
from shards.errors import ShardError
from shards.manifest import LatentSpec, Manifest, Product, TextSpec
from shards.reader import ProductReader
from shards.sidecar import Sidecar

CHUNK_BYTES = 1 << 22


def faults(cache: Path) -> Iterator[tuple[str, list[str]]]:
    """Check every shard of a cache; yield (what was checked, its faults) as it is done.

    Checked are presence, size and sha256 of the tars, the sidecars against the manifest, every
    record's shapes and dtypes, that its numbers are finite, and that every reference to a prompt
    or an image is met.

    Raises:
        ShardError: there is no manifest to check against.
    """
    found = manifest.load(cache)
    readers = {
        folder: ProductReader(cache / folder, product) for folder, product in found.products()
    }
    tasks = [
        (folder, shard)
        for folder, product in found.products()
        for shard in range(product.num_shards)
    ]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda task: _shard_faults(found, readers, *task), tasks)
        for (folder, shard), wrong in zip(tasks, results, strict=True):
            yield f"{folder}/{shard:06d}", wrong
    yield "captions", _caption_faults(found, readers["latents"])


def num_shards(found: Manifest) -> int:
    """Return how many shards `faults` will report on."""
    return sum(product.num_shards for _, product in found.products())


def _shard_faults(
    found: Manifest, readers: dict[str, ProductReader], folder: str, shard: int
) -> list[str]:
    reader = readers[folder]
    try:
        wrong = _tar_faults(reader.folder, reader.product, shard)
        if wrong:
            return wrong
        return list(_record_faults(found, readers, folder, shard))
    except (ShardError, OSError) as error:
        return [str(error)]


def _tar_faults(folder: Path, product: Product, shard: int) -> list[str]:
    path = sidecar.tar_path(folder, shard)
    size = path.stat().st_size
    if size != product.shard_bytes[shard]:
        return [f"{path}: {product.shard_bytes[shard]} bytes expected, found {size}"]
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
    if sha256.hexdigest() != product.shard_sha256[shard]:
        return [f"{path}: its sha256 is not the one in the manifest; the file has been changed"]
    return []


def _record_faults(
    found: Manifest, readers: dict[str, ProductReader], folder: str, shard: int
) -> Iterator[str]:
    reader = readers[folder]
    card = reader.sidecar(shard)
    if card.num_records != reader.product.shard_records[shard]:
        yield f"{folder}/{shard:06d}: {card.num_records} records, not the manifest's count"
    yield from _member_faults(reader.folder, card)
    expected = expected_tensors(found, folder)
    for index, key in enumerate(card.keys):
        where = f"{folder}/{shard:06d}: {key}"
        reader.about(shard, index)
        tensors = reader.tensors(shard, index)
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors or name not in expected:
                yield f"{where}: {name} is {'missing' if name in expected else 'unexpected'}"
                continue
            tensor = tensors[name]
            shape, dtype = expected[name]
            if tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{dtype}":
                yield (
                    f"{where}: {name} expected {list(shape)} {dtype}, "
                    f"found {list(tensor.shape)} {tensor.dtype}"
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield f"{where}: {name} holds numbers that are not finite"
    if folder == "latents":
        for key, prompts in zip(card.keys, card.prompts or [[]] * len(card.keys), strict=True):
            if not prompts:
                yield f"{folder}/{shard:06d}: {key} has no caption"
            yield from _unmet(readers["text"], prompts)
    elif folder.startswith("conditioning/"):
        yield from _unmet(readers["latents"], card.keys)


def _member_faults(folder: Path, card: Sidecar) -> Iterator[str]:
    """Hold the tar's own headers against the sidecar, which all reading goes by."""
    path = sidecar.tar_path(folder, card.shard)
    expected = [
        member
        for key, (start, size, about_start, about_size) in zip(card.keys, card.spans, strict=True)
        for member in (
            (f"{key}.safetensors", start, size),
            (f"{key}.json", about_start, about_size),
        )
    ]
    try:
        with tarfile.open(path, "r:") as tar:
            found = [(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
    except tarfile.TarError as error:
        yield f"{path}: not a tar ({error})"
        return
    for want, have in itertools.zip_longest(expected, found):
        if want != have:
            yield f"{path}: the sidecar lists {want} where the tar has {have}"
            return


def _caption_faults(found: Manifest, latents: ProductReader) -> list[str]:
    try:
        sidecars = [latents.sidecar(shard) for shard in range(latents.product.num_shards)]
    except ShardError:
        return []  # reported with its shard
    if manifest.captions_digest(sidecars) == found.captions:
        return []
    return [f"{latents.folder}: the sidecars' captions are not those the manifest was written for"]


def _unmet(reader: ProductReader, keys: list[str]) -> Iterator[str]:
    for key in keys:
        try:
            reader.locate(key)
        except ShardError as error:
            yield str(error)


def expected_tensors(found: Manifest, folder: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, dtype) of the tensors in a product's records."""
    if folder == "text":
        return _text_tensors(found.text_spec)
    if folder == "latents":
        return _latent_tensors("latent", found.latent_spec)
    kind, _, name = folder.partition("/")
    spec = found.conditioning_specs[name]
    if kind == "validation":
        height, width = spec.height * spec.vae_scale_factor, spec.width * spec.vae_scale_factor
        return {
            **_text_tensors(found.text_spec),
            **_latent_tensors("conditioning_latent", spec),
            "conditioning_image": ((3, height, width), "uint8"),
        }
    return _latent_tensors("conditioning_latent", spec)


def _text_tensors(spec: TextSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        "clip_embeds": ((spec.clip_tokens, spec.clip_width), spec.dtype),
        "t5_embeds": ((spec.max_sequence_length, spec.t5_width), spec.dtype),
        "pooled_embeds": ((spec.pooled_width,), spec.dtype),
    }


def _latent_tensors(name: str, spec: LatentSpec) -> dict[str, tuple[tuple[int, ...], str]]:
    shape = (spec.latent_channels, spec.height, spec.width)
    names = [name, f"{name}_std"] if spec.posterior == "mean_std" else [name]
    return dict.fromkeys(names, (shape, spec.dtype))
