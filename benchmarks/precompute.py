"""`python -m benchmarks.precompute`: how busy stage 1 keeps its encoders, and what its cache takes.

- Speed: circles of some size through the two passes; the time in the encoders over the time from
  the first to the last shard (1 is the limit), images and prompts a second. The miniature base on
  a CPU; with --true-size random weights of SD3's sizes, for a GPU.
- Prompts: how many of fill50k's rows share one, counted over rows drawn from its name pairs.
- Bytes a sample at SD3's sizes, from records that are really written: ours; ours without sharing
  prompts; a float16 cache with one padded [154, 4096] embedding a row; and the Arrow text cache of
  diffusers' training script, also really written.
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

from benchmarks.encoders import save_true_size
from benchmarks.synthetic import Shape
from common.atomic_files import write_text
from common.device import keep_freed_memory, pick_device
from common.options import CONTEXT
from common.provenance import commit, machine, versions
from demo.circles import circles, write_circles
from precompute.config import PrecomputeConfig
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.image_pass import encode_images
from precompute.encoding.text_pass import encode_text
from precompute.planning.digest_cache import DigestCache
from precompute.planning.inventory import take_inventory
from precompute.planning.prepare import prepare
from precompute.planning.products import distinct_prompts
from precompute.sources.source import Kind, Row
from shards.format.records import Record, TensorSpec, record_bytes, record_key
from shards.format.writer import write_shard

MINIATURE = Path("demo/miniature")
FILL50K_ROWS = 50_000
WRITTEN_RECORDS = 24
PADDED = TensorSpec((154, 4096), torch.float16)
POOLED = TensorSpec((2048,), torch.float16)


@click.command(context_settings=CONTEXT)
@click.option("--images", default=128, show_default=True, help="To encode.")
@click.option("--resolution", default=512, show_default=True, help="Of them, in pixels.")
@click.option("--true-size", is_flag=True, help="SD3's own sizes, random weights; on a GPU.")
@click.option("--layers", type=int, help="Of the true-size text encoders; all of them by default.")
@click.option("--vae-batch-size", default=8, show_default=True)
@click.option("--rows", default=FILL50K_ROWS, show_default=True, help="To count prompts in.")
@click.option("--device", help="The best there is by default.")
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
    where = pick_device(device)
    keep_freed_memory(where)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = MINIATURE
        if true_size:
            base = folder / "base"
            save_true_size(base, dtype=torch.bfloat16, layers=layers)
        write_circles(folder / "source", circles(images, seed=0))
        config = PrecomputeConfig(
            source=str(folder / "source"),
            pretrained_model_name_or_path=str(base),
            cache=folder / "cache",
            resolution=resolution,
            text_dtype="bfloat16" if true_size else "float32",
            vae_batch_size=vae_batch_size,
            device=str(where),
        )
        rows_a_prompt = prompts_shared(rows)
        figures = {
            "speed": speed(config),
            "rows a prompt": rows_a_prompt,
            "bytes": bytes_a_sample(folder, rows_a_prompt),
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
    for name, found in figures["speed"].items():
        click.echo(
            f"{name:8s} {found['per_s']:8.1f} a second, encoders busy {found['busy']:.1%} "
            f"of {found['seconds']:.1f} s (loading not counted: {found['loading_s']:.1f} s)"
        )
    click.echo(f"rows a prompt record: {figures['rows a prompt']:.2f} of fill50k's")
    for resolution, found in figures["bytes"].items():
        click.echo(f"{resolution} px, bytes a sample:")
        for name, size in found.items():
            click.echo(f"  {name:52s} {size:12.0f}" if size > 10 else f"  {name:52s} {size:12.3f}")


def speed(config: PrecomputeConfig) -> dict[str, dict[str, float]]:
    """Return what each pass did a second, and the share of its time spent in the encoders.

    The time is that from the first batch's start to the last shard's sidecar.
    """
    context = prepare(config)

    def measured(count: int, clock: EncoderClock, start: float) -> dict[str, float]:
        seconds = time.perf_counter() - clock.began
        return {
            "busy": clock.seconds / seconds,
            "per_s": count / seconds,
            "seconds": seconds,
            "loading_s": clock.began - start,
        }

    found, clock, start = {}, EncoderClock(context.device), time.perf_counter()
    embeds = encode_text(context, lambda: None, clock)
    found["text"] = measured(len(context.prompts), clock, start)
    clock, start = EncoderClock(context.device), time.perf_counter()
    encode_images(context, embeds, lambda: None, clock)
    found["latents"] = measured(2 * len(context.inventory), clock, start)
    return found


class Captions:
    """A source of captions alone, all with one image."""

    has_conditioning_images = True

    def __init__(self, captions: Sequence[str]) -> None:
        self.captions = captions

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.captions)

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers."""
        for index in indices:
            yield Row(f"row {index}", "image", "edges", self.captions[index])

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the same bytes for all."""
        return b"any"

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return the same version for all."""
        return kind.encode().ljust(16)[:16]


def prompts_shared(num_rows: int) -> float:
    """Return how many rows share a prompt record, of rows drawn from fill50k's name pairs."""
    source = Captions([circle.prompt for circle in circles(num_rows, seed=0)])
    with tempfile.TemporaryDirectory() as name:
        digests = DigestCache(Path(name) / "hashes.npy", keep=False)
        inventory = take_inventory(source, range(num_rows), digests, conditioning=True)
    return num_rows / (len(distinct_prompts(inventory)) - 1)


def bytes_a_sample(folder: Path, rows_a_prompt: float) -> dict[str, dict[str, float]]:
    """Return what a sample takes on disk at SD3's sizes, tar headers and sidecars included."""
    arrow = _arrow_bytes(folder)
    found = {}
    for resolution in (512, 1024):
        shape = Shape(side=resolution // 8)
        grid = (shape.side, shape.side)
        text = _written(folder / f"text{resolution}", shape.text_spec().tensors())
        latent = _written(
            folder / f"latent{resolution}", shape.latent_spec().tensors("latent", grid)
        )
        padded = record_bytes({"prompt_embeds": PADDED, "pooled_prompt_embeds": POOLED})
        found[str(resolution)] = {
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
    return found


def _written(folder: Path, specs: dict[str, TensorSpec]) -> float:
    """Write records of zeros; return the bytes that one takes, with its share of the sidecar."""
    tensors = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    about = {"image_hash": "0" * 32, "conditioning_hash": "0" * 32}
    records = (
        Record(record_key(0, row, "0" * 16), tensors, about) for row in range(WRITTEN_RECORDS)
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
    return sum(Path(one["filename"]).stat().st_size for one in table.cache_files) / WRITTEN_RECORDS


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.precompute")
