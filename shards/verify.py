"""Holding a cache against its own manifest and sidecars, byte by byte."""

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from common.errors import ShardError
from shards.format import manifest, sidecar
from shards.format.manifest import Manifest, Product
from shards.format.sidecar import Sidecar
from shards.format.writer import MEMBERS
from shards.reading.location import LocalFiles, file_sha256
from shards.reading.reader import ProductReader

CHUNK_BYTES = 1 << 20


def faults(cache: Path) -> Iterator[tuple[str, list[str]]]:
    """Check every shard of a cache; yield (what was checked, its faults) as it is done.

    Checked are presence, size and sha256 of tars and sidecars, the sidecars against the tars' own
    headers, every record's checksums, shapes and dtypes, that its numbers are finite, and that
    every reference to a prompt or an image is met.

    Raises:
        ShardError: there is no manifest to check against.
    """
    files = LocalFiles(cache)
    found = files.manifest()
    readers = {
        folder: ProductReader(files, folder, product, found.expected(folder))
        for folder, product in found.products()
    }
    tasks = [
        (folder, shard)
        for folder, product in found.products()
        for shard in range(product.num_shards)
    ]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda task: _shard_faults(cache, readers, *task), tasks)
        for (folder, shard), wrong in zip(tasks, results, strict=True):
            yield f"{folder}/{shard:06d}", wrong
    yield "captions", _caption_faults(found, cache / "latents")


def num_shards(found: Manifest) -> int:
    """Return how many shards `faults` will report on."""
    return sum(product.num_shards for _, product in found.products())


def _shard_faults(
    cache: Path, readers: dict[str, ProductReader], folder: str, shard: int
) -> list[str]:
    reader = readers[folder]
    try:
        wrong = _tar_faults(cache / folder, reader.product, shard)
        if wrong:
            return wrong
        reader.index(shard)  # holds the sidecar against the manifest
        card = sidecar.load(cache / folder, shard)
    except (ShardError, OSError) as error:
        return [str(error)]
    if card is None:
        return [f"{cache / folder}: the sidecar of shard {shard:06d} vanished"]
    return [
        *_member_faults(cache / folder, card),
        *_record_faults(reader, shard),
        *_reference_faults(readers, folder, card),
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
    index = reader.index(shard)
    wanted = {"prompt"} if "clip_embeds" in reader.expected[0] else set()
    for number in range(index.num_records):
        try:
            about = reader.about(shard, number)
            if "prompt" in wanted and not isinstance(about.get("prompt"), str):
                where = f"{reader.files.name(reader.folder, shard)}: record {index.key(number)}"
                yield f"{where}: its JSON holds no prompt"
            tensors = reader.tensors(shard, number)
        except ShardError as error:
            yield str(error)
            continue
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield (
                    f"{reader.files.name(reader.folder, shard)}: record {index.key(number)}: "
                    f"{name} holds numbers that are not finite"
                )


def _reference_faults(
    readers: dict[str, ProductReader], folder: str, card: Sidecar
) -> Iterator[str]:
    """Yield what a shard's records refer to and is not there."""
    if folder == "latents":
        for key, prompts in zip(card.keys, card.prompts or [[]] * len(card.keys), strict=True):
            if not prompts:
                yield f"{folder}/{card.shard:06d}: {key} has no caption"
            yield from _unmet(readers["text"], prompts)
    elif folder.startswith("conditioning/"):
        yield from _unmet(readers["latents"], card.keys)


def _member_faults(folder: Path, card: Sidecar) -> Iterator[str]:
    """Hold the tar's own headers and padding against the sidecar, which all reading goes by."""
    path = sidecar.tar_path(folder, card.shard)
    members = [
        (key + suffix, span[at], span[at + 1])
        for key, span in zip(card.keys, card.spans, strict=True)
        for at, suffix in zip((0, 2), MEMBERS, strict=True)
    ]
    end = 0
    with path.open("rb") as file:
        for name, start, size in members:
            gap = start - tarfile.BLOCKSIZE - end
            if not 0 <= gap < tarfile.BLOCKSIZE:
                yield f"{path}: {name} is said to begin at {start}, {gap} bytes behind the last"
                return
            file.seek(end)
            padding, header = file.read(gap), file.read(tarfile.BLOCKSIZE)
            try:
                found = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            except (tarfile.HeaderError, ValueError) as error:
                yield f"{path}: no tar header for {name} at {start - len(header)} ({error})"
                return
            if (found.name, found.size) != (name, size) or not found.isreg() or any(padding):
                yield f"{path}: the sidecar lists {name} of {size} bytes, the tar has {found.name}"
                return
            end = start + size
        file.seek(end)
        rest = card.tar_bytes - end
        zeros = all(not any(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))
    if card.tar_bytes % tarfile.RECORDSIZE or rest < 2 * tarfile.BLOCKSIZE or not zeros:
        yield f"{path}: does not end as a tar does, or holds more than the sidecar lists"


def _caption_faults(found: Manifest, folder: Path) -> list[str]:
    loaded = (sidecar.load(folder, shard) for shard in range(found.latents.num_shards))
    try:
        if manifest.captions_digest(one for one in loaded if one) == found.captions:
            return []
    except (ShardError, OSError):
        return []  # reported with its shard
    return [f"{folder}: the sidecars' captions are not those the manifest was written for"]


def _unmet(reader: ProductReader, keys: list[str]) -> Iterator[str]:
    for key in keys:
        try:
            reader.locate(key)
        except ShardError as error:
            yield str(error)
