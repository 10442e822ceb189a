"""`python -m benchmarks.precompute`: how busy stage 1 keeps its encoders, and its cache's size.

- Speed: circles go through the two passes. Reported are images and prompts a second, and the time
  in the encoders over the time from the first to the last shard, which is at most 1. The base is
  the miniature; --true-size takes random weights of SD3's sizes, for a GPU.
- Prompts: the number of fill50k's rows that share one, counted over rows with its pairs of colours.
- Bytes a sample at SD3's sizes, from records that are written: ours; ours without sharing prompts;
  a float16 cache with one padded [154, 4096] embedding a row; and the Arrow text cache of
  diffusers' training script, written too.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.random_weights import save_encoders
from benchmarks.synthetic import Shape
from common.atomic_files import write_text
from common.command import CONTEXT
from common.device import keep_freed_memory, pick_device
from common.provenance import commit, machine, versions
from demo.circles import random_circles, write_circles
from precompute.config import PrecomputeConfig
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.image_pass import encode_images
from precompute.encoding.text_pass import encode_text
from precompute.fingerprints.digest_cache import DigestCache
from precompute.planning.inventory import take_inventory
from precompute.planning.prepare import prepare
from precompute.planning.products import distinct_prompts
from precompute.sources.source import Kind, Row
from shards.format.keys import record_key
from shards.format.records import Record
from shards.format.tensor_spec import TensorSpec, record_bytes
from shards.format.writer import write_shard
from shards.reading.tensors import torch_dtype

MINIATURE = Path("demo/miniature")
FILL50K_ROWS = 50_000
WRITTEN_RECORDS = 24
PADDED = TensorSpec((154, 4096), "float16")
POOLED = TensorSpec((2048,), "float16")


@click.command(context_settings=CONTEXT)
@click.option("--images", default=128, show_default=True, help="Number of images to encode.")
@click.option("--resolution", default=512, show_default=True, help="Side of the images in pixels.")
@click.option(
    "--true-size", is_flag=True, help="Models of SD3's own sizes with random weights; for a GPU."
)
@click.option("--layers", type=int, help="Layers of the true-size text encoders; all by default.")
@click.option("--vae-batch-size", default=8, show_default=True)
@click.option(
    "--rows",
    default=FILL50K_ROWS,
    show_default=True,
    help="Number of rows in which prompts are counted.",
)
@click.option("--device", help="cuda, mps or cpu; the best one by default.")
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/precompute.json"),
    show_default=True,
)
def main(
    images: int,
    resolution: int,
    true_size: bool,
    layers: int | None,
    vae_batch_size: int,
    rows: int,
    device: str | None,
    results: Path,
) -> None:
    """Measure stage 1."""
    torch_device = pick_device(device)
    keep_freed_memory(torch_device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = MINIATURE
        if true_size:
            base = folder / "base"
            save_encoders(base, dtype=torch.bfloat16, layers=layers)
        write_circles(folder / "source", random_circles(images, seed=0))
        config = PrecomputeConfig(
            source=str(folder / "source"),
            pretrained_model_name_or_path=str(base),
            cache=folder / "cache",
            resolution=resolution,
            text_dtype="bfloat16" if true_size else "float32",
            vae_batch_size=vae_batch_size,
            device=str(torch_device),
        )
        rows_a_prompt = measure_sharing(rows)
        figures = {
            "speed": measure_speed(config),
            "rows a prompt": rows_a_prompt,
            "bytes": measure_bytes(folder, rows_a_prompt),
            "images": images,
            "resolution": resolution,
            "true size": true_size,
            "vae_batch_size": vae_batch_size,
            "threads": torch.get_num_threads(),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }
    write_text(results, json.dumps(figures, indent=1, sort_keys=True) + "\n")
    report(figures)


def report(figures: dict[str, Any]) -> None:
    """Print the figures as tables."""
    for name, speed in figures["speed"].items():
        click.echo(
            f"{name:8s} {speed['per_s']:8.1f} a second, encoders busy {speed['busy']:.1%} "
            f"of {speed['seconds']:.1f} s (loading not counted: {speed['loading_s']:.1f} s)"
        )
    click.echo(f"rows a prompt record: {figures['rows a prompt']:.2f} of fill50k's")
    for resolution, sizes in figures["bytes"].items():
        click.echo(f"{resolution} px, bytes a sample:")
        for name, size in sizes.items():
            click.echo(f"  {name:52s} {size:12.0f}" if size > 10 else f"  {name:52s} {size:12.3f}")


def measure_speed(config: PrecomputeConfig) -> dict[str, dict[str, float]]:
    """Return each pass's rate, and the share of its time spent in the encoders.

    The time runs from the first batch's start to the last shard's sidecar.
    """
    context = prepare(config)

    def figures(count: int, clock: EncoderClock, start: float) -> dict[str, float]:
        seconds = time.perf_counter() - clock.began
        return {
            "busy": clock.seconds / seconds,
            "per_s": count / seconds,
            "seconds": seconds,
            "loading_s": clock.began - start,
        }

    clock, start = EncoderClock(context.device), time.perf_counter()
    embeds = encode_text(context, lambda: None, clock)
    text = figures(len(context.prompts), clock, start)
    clock, start = EncoderClock(context.device), time.perf_counter()
    encode_images(context, embeds, lambda: None, clock)
    return {"text": text, "latents": figures(2 * len(context.inventory), clock, start)}


class Captions:
    """A source of captions; all rows have the same image."""

    has_conditioning_images = True

    def __init__(self, captions: Sequence[str]) -> None:
        self.layout, self.remarks = "made up", list[str]()
        self.captions = captions

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.captions)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers."""
        for index in indices:
            yield Row(f"row {index}", "image", "edges", self.captions[index])

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the same bytes for all rows."""
        return b"any"

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return the same version for all rows."""
        return kind.encode().ljust(16)[:16]


def measure_sharing(num_rows: int) -> float:
    """Return the mean number of rows with the same prompt, over rows like fill50k's."""
    source = Captions([circle.prompt for circle in random_circles(num_rows, seed=0)])
    with tempfile.TemporaryDirectory() as name:
        digests = DigestCache(Path(name) / "hashes.npy", keep=False)
        inventory = take_inventory(
            source, range(num_rows), digests, conditioning=True, transparency=False
        )
    return num_rows / (len(distinct_prompts(inventory)) - 1)


def measure_bytes(folder: Path, rows_a_prompt: float) -> dict[str, dict[str, float]]:
    """Return the bytes of a sample on disk at SD3's sizes, tar headers and sidecars included."""
    arrow = _arrow_bytes(folder)
    sizes = {}
    for resolution in (512, 1024):
        shape = Shape(side=resolution // 8)
        grid = (shape.side, shape.side)
        text = _record_bytes(folder / f"text{resolution}", shape.text_spec().tensor_specs())
        latent = _record_bytes(
            folder / f"latent{resolution}", shape.latent_spec().tensor_specs("latent", grid)
        )
        padded = record_bytes({"prompt_embeds": PADDED, "pooled_prompt_embeds": POOLED})
        sizes[str(resolution)] = {
            "ours: text, shared": text / rows_a_prompt,
            "ours: latent": latent,
            "ours: conditioning latent": latent,
            "ours: all": text / rows_a_prompt + 2 * latent,
            "ours without sharing prompts: all": text + 2 * latent,
            "one padded float16 embedding a row, text alone": padded,
            "one padded float16 embedding a row, with latents": padded + 2 * latent,
            "the reference's Arrow cache, text alone": arrow,
            "ours: text and latent / padded, text and latent": (text / rows_a_prompt + latent)
            / (padded + latent),
            "ours: text and latent / padded, text alone": (text / rows_a_prompt + latent) / padded,
            "ours: all / Arrow, text alone": (text / rows_a_prompt + 2 * latent) / arrow,
        }
    return sizes


def _record_bytes(folder: Path, specs: dict[str, TensorSpec]) -> float:
    """Write records of zeros; return the bytes of one, with its share of the sidecar."""
    tensors = {
        name: torch.zeros(spec.shape, dtype=torch_dtype(spec)) for name, spec in specs.items()
    }
    about = {"image_hash": "0" * 32, "conditioning_hash": "0" * 32}
    records = (
        Record(record_key(0, slot, "0" * 16), tensors, about) for slot in range(WRITTEN_RECORDS)
    )
    write_shard(folder, 0, records, fingerprint="0" * 32)
    return sum(path.stat().st_size for path in folder.iterdir()) / WRITTEN_RECORDS


def _arrow_bytes(folder: Path) -> float:
    """Return the bytes a row of the reference's text cache: nested float32 lists in Arrow."""
    import datasets

    def embeddings(_: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt_embeds": np.zeros(PADDED.shape, np.float32),
            "pooled_prompt_embeds": np.zeros(POOLED.shape, np.float32),
        }

    names = {"text": [f"caption {row}" for row in range(WRITTEN_RECORDS)]}
    progress = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict(names).map(
        embeddings, cache_file_name=str(folder / "embeddings.arrow"), writer_batch_size=8
    )
    if progress:
        datasets.enable_progress_bars()
    return (
        sum(Path(file["filename"]).stat().st_size for file in table.cache_files) / WRITTEN_RECORDS
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.precompute")
