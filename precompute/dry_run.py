"""`--dry-run`: what a run would make, how much room and memory it needs, and how long it takes."""

import gc
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import torch

from precompute.encoding import image_pass, text_pass
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.vae_encoder import LatentEncoder
from precompute.planning.job import Job
from precompute.planning.plan import ProductPlan

TRIALS = 3


def dry_run(job: Job) -> None:
    """Print the plan, with times from encoding a few batches; write nothing."""
    config = job.config
    rows, captions = len(job.inventory), len(job.prompts.numbers)
    click.echo(f"{rows} rows, {captions} captions, {len(job.prompts)} distinct prompts")
    if job.bad.reasons:
        click.echo(f"{len(job.bad.reasons)} rows would be left out:\n{job.bad.table()}")
    heads = ("product", "records", "shards", "to make", "bytes a record", "MB in all", "MB to make")
    lines = [heads, *(_line(folder, product, job) for folder, product in job.products().items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        click.echo(f"  {line[0]:<{widths[0]}}  {'  '.join(cells)}")
    for folder, reason in job.reasons.items():
        if reason:
            click.echo(f"  {folder}: {reason}")
    needed = sum(_bytes(product, job.todo(product)) for product in job.products().values())
    free = shutil.disk_usage(_existing(config.cache)).free
    click.echo(f"disk: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free at {config.cache}")
    if needed > free:
        click.echo("  that does not fit")
    prompts = _records(job.text, job.todo(job.text))
    pictures = _records(job.latents, job.todo(job.latents))
    pictures += _records(job.conditioning, job.todo(job.conditioning))
    workers = f", on each of {job.part.count} workers" if job.part.count > 1 else ""
    click.echo(f"on {job.device}{workers}, from a short trial:")
    if prompts:
        _report("text", prompts, "prompts", *_time_text(job), job.device)
    if pictures:
        _report("latents", pictures, "images", *_time_latents(job), job.device)
    click.echo("nothing was written")


def _report(
    name: str, count: int, unit: str, seconds: float, memory: int, device: torch.device
) -> None:
    where = "GPU memory" if device.type == "cuda" else "memory, this program included"
    click.echo(
        f"  {name}: {count} {unit} at {1 / seconds:.3g}/s, {_duration(count * seconds)}; "
        f"{memory / 1e9:.2f} GB of {where}"
    )


def _duration(seconds: float) -> str:
    """Return e.g. `2 h 05 min` or `12 s`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _existing(path: Path) -> Path:
    """Return the nearest folder above that exists."""
    path = path.absolute()
    return path if path.is_dir() or path == path.parent else _existing(path.parent)


def _line(folder: str, product: ProductPlan, job: Job) -> tuple[str, ...]:
    todo = job.todo(product)
    sizes = sorted(set(product.record_bytes))
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    everything = _bytes(product, range(product.num_shards))
    return (
        folder,
        str(product.num_records),
        str(product.num_shards),
        str(len(todo)),
        each,
        f"{everything / 1e6:.1f}",
        f"{_bytes(product, todo) / 1e6:.1f}",
    )


def _bytes(product: ProductPlan, shards: Iterable[int]) -> int:
    return sum(product.shard_bytes(product.shard(shard)) for shard in shards)


def _records(product: ProductPlan, shards: list[int]) -> int:
    return sum(len(product.shard(shard).items) for shard in shards)


def _time_text(job: Job) -> tuple[float, int]:
    """Return seconds a prompt and the peak of memory, in bytes."""
    config = job.config
    size = text_pass.USUAL_BATCH if config.text_batch_size == "auto" else config.text_batch_size
    encoders = TextEncoders(job.base, job.text_settings, job.device, config.variant)
    prompts = [job.prompt(item % len(job.prompts)) for item in range(size)]
    return _timed(
        job, size, lambda: encoders.encode(encoders.tokenize(prompts), BatchSize(size)).wait()
    )


def _time_latents(job: Job) -> tuple[float, int]:
    """Return seconds an image and the peak of memory, in bytes."""
    config = job.config
    size = image_pass.USUAL_BATCH if config.vae_batch_size == "auto" else config.vae_batch_size
    encoder = LatentEncoder(job.base, job.latent_settings, job.device, config.variant)
    width, height = max(job.latent_settings.shapes, key=lambda shape: shape[0] * shape[1])
    pixels = torch.zeros(size, 3, height, width, dtype=torch.uint8)
    return _timed(
        job, size, lambda: encoder.encode(pixels, "-1_1", "latent", BatchSize(size)).wait()
    )


def _timed(job: Job, size: int, encode: Callable[[], object]) -> tuple[float, int]:
    cuda = job.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(job.device)
    encode()  # the first pays for what is set up once
    start = time.perf_counter()
    for _ in range(TRIALS):
        encode()
    seconds = (time.perf_counter() - start) / TRIALS / size
    memory = torch.cuda.max_memory_allocated(job.device) if cuda else _peak_resident_bytes()
    gc.collect()
    return seconds, memory


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
