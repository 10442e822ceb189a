"""Ways to read a cache from front to back, ours and others', for `benchmarks.loader` to time."""

import itertools
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from common.device import keep_freed_memory
from common.prefetch import prefetch
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from shards.reading.tensors import empty_tensors
from train.data import Batch, RankPlaces, TrainingSamples, read_batches

BATCH = 8
THREADS = 2  # as in the presets
BUFFER_BYTES = 1 << 24
ARROW_ROWS = 24


def read_raw(files: list[Path]) -> int:
    """Read files from front to back; return their bytes."""
    buffer = bytearray(BUFFER_BYTES)
    total = 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def read_shuffled(cache: Cache, images: int, threads: int) -> int:
    """Read an epoch in batches, shuffled; return the number of samples."""
    order = Order(cache.conditioning.product.shard_records, seed=0)
    specs = cache.sample_specs(0)

    def read(work: tuple[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        first, batch = work
        places = range(first, first + BATCH)
        samples = [cache.sample_records(*order.record(place)) for place in places]
        cache.read(batch, samples, [sample.prompts[0] for sample in samples])
        return batch

    batches = (
        (first, empty_tensors(specs, BATCH)) for first in range(0, images - BATCH + 1, BATCH)
    )
    with ThreadPoolExecutor(threads) as pool:
        count = sum(1 for _ in prefetch(pool, read, batches, lead=2 * threads))
    return count * BATCH


def read_for_training(cache: Cache, images: int) -> int:
    """Read batches as training does, with its noise; return the number of samples."""
    batches = training_batches(cache)
    count = sum(1 for _ in itertools.islice(batches, images // BATCH))
    batches.close()
    return count * BATCH


def training_batches(cache: Cache) -> Generator[tuple[list[int], Batch], None, None]:
    """Return training's batches with their places, without end."""
    order = Order(cache.conditioning.product.shard_records, seed=0)
    samples = TrainingSamples([cache], unmixed(order), seed=0, proportion_empty_prompts=0.0)
    places = RankPlaces(0, batch_size=BATCH, rank=0, num_ranks=1)
    return read_batches(samples, places, num_workers=THREADS, pin=False)


def read_with_webdataset(files: list[Path]) -> int:
    """Stream all tars with webdataset, decode and batch them; return the bytes of the tensors."""
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
    names = [name for name in samples[0] if not name.startswith("__")]  # webdataset's own
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def arrow_reader(cache: Cache) -> Callable[[], tuple[int, int]]:
    """Return a function that reads prompt embeddings from an Arrow table of nested lists.

    The function returns the bytes of the tensors and the number of rows.
    """
    import datasets

    rows = _embedding_rows(cache)
    nested = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    table = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            prompt_embeds=nested, pooled_prompt_embeds=datasets.Sequence(datasets.Value("float32"))
        ),
    )

    def read() -> tuple[int, int]:
        total = 0
        for start in range(0, len(table), BATCH):
            examples = [table[index] for index in range(start, min(start + BATCH, len(table)))]
            for name in rows:
                total += torch.stack([torch.tensor(example[name]) for example in examples]).nbytes
        return total, len(table)

    return read


def _embedding_rows(cache: Cache) -> dict[str, list[Any]]:
    """Return the first prompt embeddings as the reference keeps them: padded, as nested lists."""
    count = min(ARROW_ROWS, cache.conditioning.index(0).num_records)
    samples = [cache.sample_records(0, index) for index in range(count)]
    rows: dict[str, list[Any]] = {"prompt_embeds": [], "pooled_prompt_embeds": []}
    for sample in samples:
        text = cache.embeddings(sample.prompts[0])
        padded = torch.nn.functional.pad(
            text["clip_embeds"], (0, text["t5_embeds"].shape[-1] - text["clip_embeds"].shape[-1])
        )
        rows["prompt_embeds"].append(torch.cat([padded, text["t5_embeds"]]).float().tolist())
        rows["pooled_prompt_embeds"].append(text["pooled_embeds"].float().tolist())
    return rows


def peak_mb(folder: str, samples: str) -> float:
    """Read a number of samples as training does; return the peak of resident memory in MB."""
    keep_freed_memory(torch.device("cpu"))
    read_for_training(Cache(Path(folder)), int(samples))
    # getrusage also counts the parent's memory from before this process's exec.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1e3
