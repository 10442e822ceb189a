"""`python -m benchmarks.loader`: how fast a cache is read, and how much memory that takes.

At the true record sizes of SD3 at 1024 px, page cache warm, all in one run:

- raw: the same files from front to back, into one buffer. No reader of these files is faster.
- ours: records in shuffled order, checked, into batches; once more with the noise that training
  draws for them.
- webdataset: its stock pipeline streams the same tars in order, one after the other, decodes the
  members with safetensors and stacks them into batches.
- arrow: what diffusers' training script does with the prompt embeddings that it keeps: rows of
  nested float32 lists, turned into tensors and stacked. Its latents it encodes anew at each step.

Then resident memory with ten times the records, and a cache of 10,000 shards.
"""

import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.synthetic import Shape, write_cache
from common.atomic_files import write_text
from common.device import keep_freed_memory
from common.options import CONTEXT
from common.prefetch import prefetch
from common.provenance import commit, machine, versions
from shards.format import manifest, sidecar
from shards.format.manifest import Product
from shards.format.sidecar import sidecar_path, tar_path
from shards.reading.cache import Cache
from shards.reading.order import Order
from train.data import Batch, RankPlaces, TrainingSamples, read_batches

SD3_1024PX = Shape(side=128)
BATCH = 8
THREADS = 2  # as in the presets
BUFFER_BYTES = 1 << 24
ROUNDS = 5
ARROW_ROWS = 24


@click.command(context_settings=CONTEXT)
@click.option("--images", default=2000, show_default=True, help="In the large cache; 2 MB each.")
@click.option("--shards", default=10_000, show_default=True, help="Of the cache that is opened.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the caches are made, for as long as this runs; the system's place by default.",
)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/loader.json"),
    show_default=True,
)
def main(images: int, shards: int, folder: Path | None, results: Path) -> None:
    """Measure the reading of caches."""
    keep_freed_memory(torch.device("cpu"))  # as training does
    with tempfile.TemporaryDirectory(dir=folder) as name:
        small, large = Path(name) / "small", Path(name) / "large"
        per_shard = max(1, images // 20)
        write_cache(large, SD3_1024PX, 20, per_shard)
        write_cache(small, SD3_1024PX, 2, per_shard)
        figures = {
            "speed": speed(large, per_shard * 20),
            "memory": memory(small, large),
            "many shards": many_shards(small, Path(name) / "many", shards),
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
    for name, found in figures["speed"].items():
        click.echo(
            f"{name:34s} {found['gb_per_s']:7.3f} GB/s {found['samples_per_s']:9.1f} samples/s "
            f"{found['gb_per_s'] / raw:6.3f} of raw"
        )
    for name in ("memory", "many shards"):
        click.echo(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures[name].items()))


def speed(cache: Path, images: int) -> dict[str, dict[str, float]]:
    """Return GB/s and samples/s by reader; the medians of some rounds, taken in turn."""
    found = Cache(cache)
    sample_bytes = sum(spec.num_bytes for spec in found.batch_tensors(0).values())
    files = sorted(path for path in cache.rglob("*.tar"))
    contestants: dict[str, Callable[[], tuple[int, float]]] = {
        "raw": lambda: (raw(files), images),
        "ours, 1 thread": lambda: (ours(found, images, 1) * sample_bytes, images),
        f"ours, {THREADS} threads": lambda: (ours(found, images, THREADS) * sample_bytes, images),
        "webdataset": lambda: (webdataset_bytes(files), images),
        "ours with training's draws": lambda: (drawn(found, images) * sample_bytes, images),
        "arrow, text only": arrow(found),
    }
    raw(files)  # warms the page cache
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            start = time.perf_counter()
            num_bytes, samples = run()
            seconds = time.perf_counter() - start
            taken[name].append((num_bytes / seconds / 1e9, samples / seconds))
    return {
        name: {
            "gb_per_s": statistics.median(rate for rate, _ in rates),
            "samples_per_s": statistics.median(rate for _, rate in rates),
        }
        for name, rates in taken.items()
    }


def raw(files: list[Path]) -> int:
    """Read files from front to back; return their bytes."""
    buffer = bytearray(BUFFER_BYTES)
    total = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def ours(cache: Cache, images: int, threads: int) -> int:
    """Read an epoch in batches, shuffled; return how many samples that were."""
    order = Order(cache.conditioning.product.shard_records, seed=0)
    specs = cache.batch_tensors(0)

    def read(work: tuple[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        first, batch = work
        pairs = [cache.pair(*order.record(place)) for place in range(first, first + BATCH)]
        cache.read(batch, pairs, [pair.prompts[0] for pair in pairs])
        return batch

    batches = (
        (first, {k: torch.empty((BATCH, *v.shape), dtype=v.dtype) for k, v in specs.items()})
        for first in range(0, images - BATCH + 1, BATCH)
    )
    with ThreadPoolExecutor(threads) as pool:
        count = sum(1 for _ in prefetch(pool, read, batches, lead=2 * threads))
    return count * BATCH


def drawn(cache: Cache, images: int) -> int:
    """Do as training does, noise and all; return how many samples that were."""
    batches = batches_of(cache)
    count = sum(1 for _ in itertools.islice(batches, images // BATCH))
    batches.close()
    return count * BATCH


def batches_of(cache: Cache) -> Generator[tuple[list[int], Batch], None, None]:
    """Return training's batches, and their places, without end."""
    order = Order(cache.conditioning.product.shard_records, seed=0)
    samples = TrainingSamples(cache, order, seed=0, proportion_empty_prompts=0.0)
    places = RankPlaces(0, batch_size=BATCH, rank=0, num_ranks=1)
    return read_batches(samples, places, num_workers=THREADS, pin=False)


def webdataset_bytes(files: list[Path]) -> int:
    """Stream all tars with webdataset, decode and batch; return the bytes of the tensors."""
    import webdataset

    total = 0
    for folder in sorted({path.parent for path in files}):
        urls = [str(path) for path in files if path.parent == folder]
        stream = (
            webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            .map(lambda sample: safetensors.torch.load(sample["safetensors"]))
            .batched(BATCH, collation_fn=_stack)
        )
        for batch in stream:
            total += sum(tensor.nbytes for tensor in batch.values())
    return total


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = [name for name in samples[0] if not name.startswith("__")]  # such are webdataset's own
    return {name: torch.stack([one[name] for one in samples]) for name in names}


def arrow(cache: Cache) -> Callable[[], tuple[int, float]]:
    """Return a measurement of reading prompt embeddings from an Arrow table of nested lists."""
    import datasets

    count = min(ARROW_ROWS, cache.conditioning.index(0).num_records)
    pairs = [cache.pair(0, index) for index in range(count)]
    rows: dict[str, list[Any]] = {"prompt_embeds": [], "pooled_prompt_embeds": []}
    for pair in pairs:
        text = cache.embeddings(pair.prompts[0])
        padded = torch.nn.functional.pad(
            text["clip_embeds"], (0, text["t5_embeds"].shape[-1] - text["clip_embeds"].shape[-1])
        )
        rows["prompt_embeds"].append(torch.cat([padded, text["t5_embeds"]]).float().tolist())
        rows["pooled_prompt_embeds"].append(text["pooled_embeds"].float().tolist())
    nested = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    table = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            prompt_embeds=nested, pooled_prompt_embeds=datasets.Sequence(datasets.Value("float32"))
        ),
    )

    def read() -> tuple[int, float]:
        total = 0
        for start in range(0, len(table), BATCH):
            examples = [table[index] for index in range(start, min(start + BATCH, len(table)))]
            for name in rows:
                total += torch.stack([torch.tensor(one[name]) for one in examples]).nbytes
        return total, len(table)

    return read


def memory(small: Path, large: Path) -> dict[str, float]:
    """Return the peak of resident memory in MB, each in a process of its own.

    As many samples are read from either, so that only the caches' sizes differ.
    """
    samples = Cache(large).conditioning.product.num_records
    code = "import sys; from benchmarks.loader import peak_mb; print(peak_mb(*sys.argv[1:]))"
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


def peak_mb(folder: str, samples: str) -> float:
    """Read so many samples as training does; return the peak of resident memory."""
    keep_freed_memory(torch.device("cpu"))
    drawn(Cache(Path(folder)), int(samples))
    # getrusage would count what the process was before it became this one.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1e3


def many_shards(template: Path, folder: Path, num_shards: int) -> dict[str, float]:
    """Return seconds to open a cache of many shards and to its first batch, beside a small one's.

    Its tars are links to those of the small cache, its sidecars as they would be.
    """
    found = manifest.load(template)
    products = {}
    for name, product in found.products():
        if product.num_shards:
            products[name] = _multiplied(template / name, folder / name, product, num_shards)
    manifest.write(
        folder,
        dataclasses.replace(
            found,
            text=products["text"],
            latents=products["latents"],
            conditioning={"conditioning": products["conditioning/conditioning"]},
        ),
    )

    def timed(cache: Path) -> tuple[float, float]:
        start = time.perf_counter()
        opened = Cache(cache)
        middle = time.perf_counter()
        batches = batches_of(opened)
        next(batches)
        end = time.perf_counter()
        batches.close()
        return middle - start, end - middle

    timed(template)
    small, many = ([timed(cache) for _ in range(ROUNDS)] for cache in (template, folder))
    return {
        "shards": num_shards,
        "open_s": statistics.median(one for one, _ in many),
        "first_batch_s": statistics.median(one for _, one in many),
        "small_open_s": statistics.median(one for one, _ in small),
        "small_first_batch_s": statistics.median(one for _, one in small),
    }


def _multiplied(template: Path, folder: Path, product: Product, num_shards: int) -> Product:
    """Fill a folder with copies of a product's last shard under other numbers."""
    folder.mkdir(parents=True)
    source = product.num_shards - 1
    card = sidecar.load(template, source)
    assert card is not None
    for shard in range(num_shards):
        number = f"{shard:06d}"
        other = dataclasses.replace(
            card,
            shard=shard,
            keys=[number + key[6:] for key in card.keys],
            prompts=[[f"{max(shard, 1):06d}{key[6:]}" for key in keys] for keys in card.prompts],
        )
        os.link(tar_path(template, source), tar_path(folder, shard))
        sidecar_path(folder, shard).write_text(sidecar.to_json(other))
    if folder.name == "text":  # the first record is the empty prompt
        for path in (tar_path, sidecar_path):
            path(folder, 0).unlink()
            shutil.copy(path(template, 0), path(folder, 0))
    first = sidecar.load(folder, 0)
    assert first is not None
    cards: Iterator[sidecar.Sidecar] = itertools.chain(
        [first], (one for shard in range(1, num_shards) if (one := sidecar.load(folder, shard)))
    )
    buckets = [] if folder.name == "text" else [0] * num_shards
    return manifest.product_of(folder, list(cards), buckets)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loader")
