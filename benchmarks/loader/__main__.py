"""`python -m benchmarks.loader`: how fast a cache is read, and how much memory that takes.

Records have the true sizes of SD3 at 1024 px, and the page cache is warm. All readers are timed in
one run:

- raw: the same files from front to back, into one buffer. No reader of these files is faster.
- ours: records in shuffled order, checked, into batches; and again with the noise that training
  draws for them.
- webdataset: its stock pipeline streams the same tars in order, one after the other, decodes the
  members with safetensors and stacks them into batches.
- arrow: as diffusers' training script reads the prompt embeddings that it keeps: rows of nested
  float32 lists, turned into tensors and stacked. It encodes its latents anew at each step.

Then follow resident memory with ten times the records, a cache of 10,000 shards, and a full shuffle
of a million small records beside one of as many as have all their indexes in memory.
"""

import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.loader.readers import (
    BATCH,
    THREADS,
    arrow_reader,
    read_for_training,
    read_raw,
    read_shuffled,
    read_with_webdataset,
    training_batches,
)
from benchmarks.synthetic import TINY, Shape, write_cache
from common.atomic_files import write_text
from common.command import CONTEXT
from common.device import keep_freed_memory
from common.provenance import commit, machine, versions
from shards.format import manifest, sidecar
from shards.format.product import Product, product_of
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.cache import Cache
from shards.reading.reader import INDEXED_RECORDS

SD3_1024PX = Shape(side=128)
ROUNDS = 5
RECORDS_A_SHARD = 1024
SHUFFLED = 20_000  # samples read a round


@click.command(context_settings=CONTEXT)
@click.option(
    "--images", default=2000, show_default=True, help="Number in the large cache; 2 MB each."
)
@click.option(
    "--shards", default=10_000, show_default=True, help="Number in the cache that is opened."
)
@click.option(
    "--records", default=1_000_000, show_default=True, help="Number of small records to shuffle."
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where temporary caches are written; the system's own place by default.",
)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/loader.json"),
    show_default=True,
)
def main(images: int, shards: int, records: int, folder: Path | None, results: Path) -> None:
    """Measure the reading of caches."""
    keep_freed_memory(torch.device("cpu"))  # as training does
    with tempfile.TemporaryDirectory(dir=folder) as name:
        small, large = Path(name) / "small", Path(name) / "large"
        per_shard = max(1, images // 20)
        write_cache(large, SD3_1024PX, 20, per_shard)
        write_cache(small, SD3_1024PX, 2, per_shard)
        figures = {
            "speed": measure_speed(large, per_shard * 20),
            "memory": measure_memory(small, large),
            "many shards": measure_many_shards(small, Path(name) / "many", shards),
            "many records": measure_many_records(Path(name) / "records", records),
            "images": per_shard * 20,
            "batch": BATCH,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }
    write_text(results, json.dumps(figures, indent=1, sort_keys=True) + "\n")
    report(figures)


def report(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    raw = figures["speed"]["raw"]["gb_per_s"]
    for name, rates in figures["speed"].items():
        click.echo(
            f"{name:34s} {rates['gb_per_s']:7.3f} GB/s {rates['samples_per_s']:9.1f} samples/s "
            f"{rates['gb_per_s'] / raw:6.3f} of raw"
        )
    for name in ("memory", "many shards", "many records"):
        click.echo(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures[name].items()))


def measure_speed(folder: Path, images: int) -> dict[str, dict[str, float]]:
    """Return GB/s and samples/s by reader: medians of rounds in which the readers take turns."""
    cache = Cache(folder)
    sample_bytes = sum(spec.num_bytes for spec in cache.sample_specs(0).values())
    files = sorted(folder.rglob("*.tar"))
    readers: dict[str, Callable[[], tuple[int, int]]] = {
        "raw": lambda: (read_raw(files), images),
        "ours, 1 thread": lambda: (read_shuffled(cache, images, 1) * sample_bytes, images),
        f"ours, {THREADS} threads": lambda: (
            read_shuffled(cache, images, THREADS) * sample_bytes,
            images,
        ),
        "webdataset": lambda: (read_with_webdataset(files), images),
        "ours with training's draws": lambda: (
            read_for_training(cache, images) * sample_bytes,
            images,
        ),
        "arrow, text only": arrow_reader(cache),
    }
    read_raw(files)  # warms the page cache
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            start = time.perf_counter()
            num_bytes, samples = read()
            seconds = time.perf_counter() - start
            rates[name].append((num_bytes / seconds / 1e9, samples / seconds))
    return {
        name: {
            "gb_per_s": statistics.median(gb_per_s for gb_per_s, _ in rounds),
            "samples_per_s": statistics.median(samples_per_s for _, samples_per_s in rounds),
        }
        for name, rounds in rates.items()
    }


def measure_memory(small: Path, large: Path) -> dict[str, float]:
    """Return the peaks of resident memory in MB of two processes that read a cache each.

    Both read the same number of samples, so that only the sizes of the caches differ.
    """
    samples = Cache(large).conditioning.product.num_records
    code = (
        "import sys; from benchmarks.loader.readers import peak_mb; print(peak_mb(*sys.argv[1:]))"
    )
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-c", code, str(cache), str(samples)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()[-1]
        )
        for cache in (small, large)
    ]
    return {"small_mb": peaks[0], "ten_times_mb": peaks[1], "growth_mb": peaks[1] - peaks[0]}


def measure_many_shards(small: Path, many: Path, num_shards: int) -> dict[str, float]:
    """Return seconds to open a cache of many shards and to read its first batch.

    Args:
        small: folder of a small cache, which is measured too.
        many: folder in which the cache of many shards is made.
        num_shards: number of its shards.
    """
    _write_many_shards(small, many, num_shards)
    _time_opening(small)  # warms the page cache
    small_times, many_times = ([_time_opening(f) for _ in range(ROUNDS)] for f in (small, many))
    return {
        "shards": num_shards,
        "open_s": statistics.median(open_s for open_s, _ in many_times),
        "first_batch_s": statistics.median(batch_s for _, batch_s in many_times),
        "small_open_s": statistics.median(open_s for open_s, _ in small_times),
        "small_first_batch_s": statistics.median(batch_s for _, batch_s in small_times),
    }


def measure_many_records(folder: Path, num_records: int) -> dict[str, float]:
    """Return the samples a second of a full shuffle of many small records, and of few.

    Their tars are links to one, so that only what depends on the number of records differs.

    Args:
        folder: folder in which caches are made.
        num_records: number of images of the large cache.
    """
    template, few, many = folder / "template", folder / "few", folder / "many"
    write_cache(template, TINY, 2, RECORDS_A_SHARD)
    few_shards = INDEXED_RECORDS // RECORDS_A_SHARD
    _write_many_shards(template, few, few_shards)
    _write_many_shards(template, many, max(few_shards, num_records // RECORDS_A_SHARD))
    caches = {"few": Cache(few), "many": Cache(many)}
    rates: dict[str, list[float]] = {"few": [], "many": []}
    for _ in range(ROUNDS + 1):
        for name, cache in caches.items():
            start = time.perf_counter()
            samples = read_shuffled(cache, SHUFFLED, THREADS)
            rates[name].append(samples / (time.perf_counter() - start))
    figures = {
        "records": float(caches["many"].conditioning.product.num_records),
        # In the first round nearly each sample is the first of its shard, and parses sidecars.
        "first_samples_per_s": rates["many"][0],
        "few_first_samples_per_s": rates["few"][0],
    }
    few_rate, many_rate = (statistics.median(rates[name][1:]) for name in ("few", "many"))
    return figures | {
        "samples_per_s": many_rate,
        "few_samples_per_s": few_rate,
        "ratio": many_rate / few_rate,
    }


def _time_opening(folder: Path) -> tuple[float, float]:
    """Return the seconds to open a cache, and from there to its first batch."""
    start = time.perf_counter()
    cache = Cache(folder)
    opened = time.perf_counter()
    batches = training_batches(cache)
    next(batches)
    end = time.perf_counter()
    batches.close()
    return opened - start, end - opened


def _write_many_shards(template: Path, folder: Path, num_shards: int) -> None:
    """Write a cache whose tars are links to those of another, with sidecars of its own."""
    original = manifest.load(template)
    products = {
        name: _repeat_shard(template / name, folder / name, product, num_shards)
        for name, product in original.products()
        if product.num_shards
    }
    copy = dataclasses.replace(
        original,
        text=products["text"],
        latents=products["latents"],
        conditioning={"conditioning": products["conditioning/conditioning"]},
    )
    manifest.write(folder, copy)


def _repeat_shard(template: Path, folder: Path, product: Product, num_shards: int) -> Product:
    """Fill a folder with links to a product's last shard under other numbers."""
    folder.mkdir(parents=True)
    source = product.num_shards - 1
    original = sidecar.load(template, source)
    assert original is not None
    for shard in range(num_shards):
        number = f"{shard:06d}"
        copy = dataclasses.replace(
            original,
            shard=shard,
            keys=[number + key[6:] for key in original.keys],
            prompts=[
                [f"{max(shard, 1):06d}{key[6:]}" for key in keys] for keys in original.prompts
            ],
        )
        os.link(tar_path(template, source), tar_path(folder, shard))
        sidecar_path(folder, shard).write_text(sidecar.to_json(copy))
    if folder.name == "text":  # the first record is the empty prompt
        for path in (tar_path, sidecar_path):
            path(folder, 0).unlink()
            shutil.copy(path(template, 0), path(folder, 0))
    sidecars = [
        loaded for shard in range(num_shards) if (loaded := sidecar.load(folder, shard)) is not None
    ]
    buckets = [] if folder.name == "text" else [0] * num_shards
    return product_of(folder, sidecars, buckets)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loader")
