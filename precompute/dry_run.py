"""`--dry-run`: what a run would build, how much disk and memory it needs, and how long it takes."""

import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from common.device import AsyncHostCopy, free_memory
from precompute.discarded import describe_discarded, describe_put_out
from precompute.encoding import image_pass, text_pass
from precompute.encoding.batch_size import BatchSize
from precompute.encoding.control_pass import pictures_to_draw, shards_to_draw
from precompute.encoding.control_values import look_at_controls
from precompute.encoding.text_encoders import TextEncoders
from precompute.encoding.text_pass import look_at_prompts
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.planning.context import Context
from precompute.planning.oddities import describe_oddities
from precompute.planning.plan import ProductPlan
from precompute.source_changes import source_changes
from sd3.annotators.drawing import BATCH, Drawing

NUM_TRIALS = 3


def dry_run(context: Context) -> None:
    """Print the plan, with times from encoding a few batches; write nothing into the cache."""
    rows, captions = len(context.inventory), len(context.prompts.numbers)
    click.echo(f"{rows} rows, {captions} captions, {len(context.prompts)} distinct prompts")
    if count := len(context.bad_rows):
        table = context.bad_rows.table()
        kept = len(context.views) - np.isin(context.views.rows, list(context.bad_rows.rows)).sum()
        click.echo(f"{count} rows would be left out, {kept} pairs kept:\n{table}")
    if changes := source_changes(context):
        click.echo(f"the source since the last run: {changes}")
    odd = [*describe_oddities(context), *look_at_controls(context), *look_at_prompts(context)]
    for line in odd:
        click.echo(f"  {line}")
    _print_products(context)
    if put_out := describe_put_out(context):
        click.echo(f"  {put_out}")
    if discarded := describe_discarded(context):
        given = "is" if context.config.overwrite else "must be"
        click.echo(f"{discarded}\n  for that --overwrite {given} given")
    _print_disk_space(context)
    _print_trials(context)
    click.echo("nothing was written to the cache")


def _print_products(context: Context) -> None:
    products = context.products_by_folder()
    heads = ("product", "records", "shards", "to make", "bytes a record", "MB in all", "MB to make")
    lines = [heads, *(_line(folder, product, context) for folder, product in products.items())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        click.echo(f"  {line[0]:<{widths[0]}}  {'  '.join(cells)}")
    for folder, reason in context.reasons.items():
        if reason:
            click.echo(f"  {folder}: {reason}")


def _line(folder: str, product: ProductPlan, context: Context) -> tuple[str, ...]:
    todo = context.shards_to_build(product)
    sizes = sorted(set(product.record_bytes))
    return (
        folder,
        str(product.num_records),
        str(product.num_shards),
        str(len(todo)),
        f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
        f"{product.count_bytes(range(product.num_shards)) / 1e6:.1f}",
        f"{product.count_bytes(todo) / 1e6:.1f}",
    )


def _print_disk_space(context: Context) -> None:
    cache, needed = context.config.cache, context.bytes_needed()
    free = shutil.disk_usage(_existing(cache)).free
    click.echo(f"disk: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free at {cache}")
    if needed > free:
        click.echo("  that does not fit")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return path if path.is_dir() or path == path.parent else _existing(path.parent)


def _print_trials(context: Context) -> None:
    """Encode a few batches; print speed, total time and memory of each pass."""
    prompts, latents, conditioning = (
        product.count_records(context.shards_to_build(product))
        for product in (
            context.products.text,
            context.products.latents,
            context.products.conditioning,
        )
    )
    count, device = context.part.count, context.device
    workers = f", on each of {count} workers" if count > 1 else ""
    click.echo(f"on {device}{workers}, from a short trial:")
    if drawings := shards_to_draw(context):
        count = sum(drawings.values())
        _print_trial("drawing", count, "images", *_time_drawing(context, min(drawings)), device)
    if prompts:
        _print_trial("text", prompts, "prompts", *_time_text(context), device)
    if latents + conditioning:
        _print_trial("latents", latents + conditioning, "images", *_time_images(context), device)


def _print_trial(
    name: str, count: int, unit: str, seconds: float, memory: int, device: torch.device
) -> None:
    free_memory()  # of its encoders: those of the next trial must not come on top
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


def _time_text(context: Context) -> tuple[float, int]:
    """Return seconds a prompt and the peak of memory, in bytes."""
    config, specs = context.config, context.specs
    size = text_pass.USUAL_BATCH if config.text_batch_size == "auto" else config.text_batch_size
    encoders = TextEncoders.load(
        specs.base,
        specs.text_settings,
        context.device,
        config.variant,
        loras=specs.loras,
        in_groups=config.offload == "groups",
    )
    prompts = [context.prompt(item % len(context.prompts)) for item in range(size)]
    parts = BatchSize(size)  # where it has shrunk, it stays so
    return _time_encoding(context, size, lambda: encoders.encode(encoders.tokenize(prompts), parts))


def _time_images(context: Context) -> tuple[float, int]:
    """Return seconds an image and the peak of memory, in bytes."""
    config, specs = context.config, context.specs
    size = image_pass.USUAL_BATCH if config.vae_batch_size == "auto" else config.vae_batch_size
    encoder = VaeEncoder.load(specs.base, specs.latent_settings, context.device, config.variant)
    width, height = specs.latent_settings.largest_shape
    pixels = torch.zeros(size, 3, height, width, dtype=torch.uint8)
    parts = BatchSize(size)  # where it has shrunk, it stays so
    return _time_encoding(context, size, lambda: encoder.encode(pixels, "-1_1", "latent", parts))


def _time_drawing(context: Context, shard: int) -> tuple[float, int]:
    """Return seconds a conditioning image and the peak of memory, in bytes."""
    assert context.annotator is not None
    pictures = pictures_to_draw(context, shard, BATCH)
    drawing = Drawing(context.annotator, str(context.device))
    return _time(context, max(1, len(pictures)), lambda: drawing.draw(pictures))


def _time_encoding(
    context: Context, size: int, encode: Callable[[], dict[str, Tensor]]
) -> tuple[float, int]:
    """Return what `_time` does for batches that are encoded and copied to the host."""
    return _time(context, size, lambda: AsyncHostCopy(encode()).wait())


def _time(context: Context, size: int, work: Callable[[], object]) -> tuple[float, int]:
    """Return seconds an item and the peak of memory, in bytes, of work on batches."""
    cuda = context.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(context.device)
    work()  # the first call includes what is set up once
    start = time.perf_counter()
    for _ in range(NUM_TRIALS):
        work()
    seconds = (time.perf_counter() - start) / NUM_TRIALS / size
    memory = torch.cuda.max_memory_allocated(context.device) if cuda else _peak_resident_bytes()
    return seconds, memory


def _peak_resident_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
