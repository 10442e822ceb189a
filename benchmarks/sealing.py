"""`python -m benchmarks.sealing`: how sealing and verifying grow with the records of a cache.

Caches of small records are written, of which each image is captioned by a prompt of any shard, as
it is where captions repeat. Each is sealed and verified in a process of its own, since the peak of
its memory is measured too. The page cache is warm.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.planning import peak_gb
from benchmarks.synthetic import TINY, write_cache
from common.atomic_files import write_text
from common.command import CONTEXT
from common.provenance import commit, machine, versions
from shards import verify
from shards.format import manifest, sidecar
from shards.format.expected_cache import ExpectedCache, ExpectedProduct
from shards.format.manifest import Manifest
from shards.format.published import samples
from shards.format.seal import seal, withdraw

RECORDS_A_SHARD = 1000


@click.command(context_settings=CONTEXT)
@click.option(
    "--images",
    "sizes",
    multiple=True,
    default=(10_000, 100_000, 1_000_000),
    show_default=True,
    help="Numbers of images, with as many prompts and conditioning images.",
)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/sealing.json"),
    show_default=True,
)
def main(sizes: tuple[int, ...], folder: Path | None, results: Path) -> None:
    """Measure the sealing and the verifying of caches."""
    if folder is not None:  # in a process of its own
        click.echo(json.dumps(measure(folder)))
        return
    by_size = {}
    for images in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_cache(Path(name), TINY, max(1, images // RECORDS_A_SHARD), RECORDS_A_SHARD)
            caption_at_random(Path(name))
            arguments = ["-m", "benchmarks.sealing", "--folder", name]
            done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, check=True)
        by_size[str(images)] = figures = json.loads(done.stdout.splitlines()[-1])
        click.echo(
            f"{figures['records']} records in {figures['shards']} shards: "
            f"sealing {figures['seal_s']:.2f} s, {figures['seal_us_a_record']:.1f} us a record, "
            f"{figures['seal_peak_gb']:.2f} GB, of which the index {figures['index_s']:.2f} s, "
            f"{figures['index_bytes_a_row']:.0f} bytes a row; "
            f"verifying {figures['verify_s']:.1f} s, "
            f"{figures['verify_us_a_record']:.1f} us a record, {figures['verify_peak_gb']:.2f} GB"
        )
    about = {"machine": machine(), "versions": versions(), "commit": commit()}
    write_text(results, json.dumps({"images": by_size, **about}, indent=1, sort_keys=True) + "\n")


def caption_at_random(cache: Path) -> None:
    """Give each image of a cache a prompt of any shard, drawn with a seed."""
    found = manifest.load(cache)
    texts = [sidecar.load_present(cache / "text", s).keys for s in range(1, found.text.num_shards)]
    draws = np.random.default_rng(0)
    for shard in range(found.latents.num_shards):
        old = sidecar.load_present(cache / "latents", shard)
        drawn = draws.integers(0, (len(texts), len(texts[0])), (old.num_records, 2))
        new = replace(old, prompts=[[texts[text][slot]] for text, slot in drawn])
        sidecar.sidecar_path(cache / "latents", shard).write_text(sidecar.to_json(new))


def measure(cache: Path) -> dict[str, Any]:
    """Seal and verify a cache; return the figures."""
    found = manifest.load(cache)
    expected = expect(cache, found)
    withdraw(cache)
    figures: dict[str, Any] = {
        "records": sum(product.num_records for _, product in found.products()),
        "shards": verify.num_shards(found),
    }

    def verify_all() -> None:
        wrong = [fault for _, faults in verify.faults(cache) for fault in faults]
        assert not wrong, wrong[:3]

    steps: dict[str, Callable[[], object]] = {
        "seal": lambda: seal(cache, expected),
        "index": lambda: samples.write(cache, found),  # a part of sealing, once more by itself
        "verify": verify_all,
    }
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        figures[f"{name}_s"] = seconds = time.perf_counter() - start
        figures[f"{name}_us_a_record"] = seconds / figures["records"] * 1e6
        figures[f"{name}_peak_gb"] = peak_gb()
    index = manifest.load(cache).samples
    assert index is not None
    figures["index_bytes_a_row"] = index.num_bytes / index.num_rows
    return figures


def expect(cache: Path, found: Manifest) -> ExpectedCache:
    """Return what a finished cache should hold, as planning says it."""
    products = {}
    for name, product in found.products():
        # Summaries, which are small: all sidecars at once would be the peak of the memory.
        loaded = (sidecar.load_summary(cache / name, s) for s in range(product.num_shards))
        summaries = [each for each in loaded if each]
        products[name] = ExpectedProduct(
            identity={},
            fingerprints=[each.fingerprint for each in summaries],
            captions=[each.captions for each in summaries] if name == "latents" else [],
            shard_buckets=product.shard_buckets,
        )
    (name,) = found.conditioning
    return ExpectedCache(
        products=products,
        conditioning_name=name,
        text_spec=found.text_spec,
        latent_spec=found.latent_spec,
        conditioning_spec=found.conditioning_specs[name],
        buckets=found.buckets,
        held_out=found.held_out,
        made_by=found.made_by,
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.sealing")
