"""`python -m benchmarks.planning`: the time and the memory that planning takes.

Rows are invented when they are read: all images and conditioning images differ, and four captions
of five are distinct. Their digests are cached, as on every run but the first, which reads every
file. SD3's records at 1024 px are planned; then again, on top of that plan, with the first
hundredth of the rows changed. Nothing is encoded.

With `--files` the rows are pairs of real files, as small as PNGs are, in fill50k's layout: the
first planning reads them all, and the second looks whether one has changed.
"""

import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from xxhash import xxh3_128_digest

from benchmarks.synthetic import Shape
from common.atomic_files import write_text
from common.command import CONTEXT
from common.provenance import commit, machine, versions
from precompute.fingerprints.digest_cache import ENTRY, NO, DigestCache
from precompute.planning import products as plans
from precompute.planning.existing_layout import layout_arrays
from precompute.planning.inventory import take_inventory
from precompute.planning.layout import EMPTY, Layout
from precompute.planning.plan import ProductPlan
from precompute.planning.views.listing import list_views
from precompute.planning.views.random_crops import RandomCrops
from precompute.sources.file_versions import SETTLED_NS
from precompute.sources.open_source import open_source
from precompute.sources.source import Kind, Row, Source, SourceSettings

SD3_1024PX = Shape(side=128)
GRID = (128, 128)
SHARD_MB = 128.0
DISTINCT = 0.8
CHANGED = 100  # the first of 100 equal parts of the rows changes


class InventedRows:
    """A source of any length.

    Args:
        num_rows: number of rows.
        edition: 0, or another number for other contents in the first hundredth of the rows.
    """

    has_conditioning_images = True

    def __init__(self, num_rows: int, edition: int = 0) -> None:
        self.layout, self.remarks = "made up", list[str]()
        self.num_rows = num_rows
        self.num_captions = int(num_rows * DISTINCT)
        self.edition = edition

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    def _edition_mark(self, index: int) -> str:
        return f" ({self.edition})" if self.edition and index < self.num_rows // CHANGED else ""

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Return the rows of these numbers."""
        for index in indices:
            number = index % self.num_captions
            caption = f"caption {number} of a photograph of something{self._edition_mark(number)}"
            yield Row(f"row {index}", f"images/{index}.jpg", f"edges/{index}.png", caption)

    def read(self, index: int, kind: Kind) -> bytes:
        """Fail: all digests are cached, so that nothing is read."""
        raise AssertionError(f"row {index}: {kind} is not in the digest cache")

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return what stands for a file's path, size and time."""
        return xxh3_128_digest(f"{kind[0]} {index}{self._edition_mark(index)}".encode())


def write_digests(path: Path, source: InventedRows) -> None:
    """Write the digests of all images of a source, as a run that reads them does."""
    kinds: tuple[Kind, ...] = ("image", "conditioning_image")
    versions = [
        source.version(index, kind) or b"" for kind in kinds for index in range(len(source))
    ]
    entries = np.zeros(len(versions), ENTRY)
    entries["version"] = np.frombuffer(b"".join(versions), ">u8").reshape(-1, 2)
    entries["digest"] = entries["version"] ^ np.uint64(0x5555555555555555)
    entries["width"] = entries["height"] = 1024
    entries["transparency"] = entries["profile"] = NO
    np.save(path, entries[np.lexsort((entries["version"][:, 1], entries["version"][:, 0]))])


def make_plans(
    source: Source, digests: DigestCache, before: dict[str, Layout]
) -> tuple[dict[str, ProductPlan], dict[str, float]]:
    """Return the plans of text, latents and conditioning, and the seconds of each part of planning.

    Args:
        source: the rows.
        digests: of the files, as far as they are known.
        before: layouts of text and latents to build on.
    """
    folder = digests.path.parent
    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = time.perf_counter() - start, time.perf_counter()

    inventory = take_inventory(
        source, range(len(source)), digests, conditioning=True, transparency=False
    )
    lap("inventory")
    prompts = plans.distinct_prompts(inventory)
    lap("distinct prompts")
    text = plans.plan_text(
        folder, prompts, {"": 0}, SD3_1024PX.text_spec().tensor_specs(), SHARD_MB, before["text"]
    )
    latent_tensors = [SD3_1024PX.latent_spec().tensor_specs("latent", GRID)]
    none_held_out = np.zeros(len(inventory), bool)
    views = list_views(none_held_out, 1, mirrored=False)
    latents = plans.plan_latents(
        folder,
        plans.image_contents(inventory.images, none_held_out, views, RandomCrops(0, 0.5, 1.0)),
        np.zeros(len(inventory), np.int64),
        none_held_out,
        {"": 0},
        latent_tensors,
        SHARD_MB,
        before["latents"],
    )
    lap("layout")
    latents = plans.with_captions(latents, views, inventory, prompts, text)
    control = plans.plan_conditioning(
        folder, latents, inventory.conditionings, {"": 1}, latent_tensors
    )
    products = {"text": text, "latents": latents, "conditioning": control}
    for product in products.values():
        assert len(product.fingerprints) == product.num_shards
    layout_arrays({"text": text, "latents": latents})
    lap("fingerprints")
    return products, seconds


def measure(num_rows: int, folder: Path) -> dict[str, Any]:
    """Plan twice; return the figures."""
    digests = [DigestCache(folder / f"hashes{edition}.npy", keep=False) for edition in (0, 1)]
    nothing = dict.fromkeys(("text", "latents"), EMPTY)
    first, seconds = make_plans(InventedRows(num_rows), digests[0], nothing)
    figures: dict[str, Any] = {
        "rows": num_rows,
        "prompts": first["text"].num_records,
        "shards": {name: product.num_shards for name, product in first.items()},
        "seconds": seconds,
        "total_s": sum(seconds.values()),
        "peak_gb": peak_gb(),
    }
    before = {name: first[name].layout for name in ("text", "latents")}
    fingerprints = {name: product.fingerprints for name, product in first.items()}
    del first
    again, seconds = make_plans(InventedRows(num_rows, edition=1), digests[1], before)
    figures["again_s"] = sum(seconds.values())
    figures["again_peak_gb"] = peak_gb()
    figures["again_same_shards"] = {
        name: sum(
            old == new for old, new in zip(fingerprints[name], product.fingerprints, strict=False)
        )
        for name, product in again.items()
    }
    return figures


def measure_files(num_rows: int, folder: Path) -> dict[str, Any]:
    """Write pairs of files, plan them twice; return the figures."""
    write_files(folder / "source", num_rows)
    settings = SourceSettings(source=str(folder / "source"))
    figures: dict[str, Any] = {"rows": num_rows}
    before = dict.fromkeys(("text", "latents"), EMPTY)
    for number in ("first", "again"):
        start = time.perf_counter()
        source = open_source(settings)
        opened = time.perf_counter() - start
        products, seconds = make_plans(source, DigestCache(folder / "hashes.npy"), before)
        before = {name: products[name].layout for name in before}
        figures[number] = {"opening": opened, **seconds}
        figures[f"{number}_us_a_row"] = (opened + sum(seconds.values())) / num_rows * 1e6
        figures[f"{number}_peak_gb"] = peak_gb()
    return figures


def write_files(folder: Path, num_rows: int) -> None:
    """Write a data set in fill50k's layout, of images of one pixel that all differ."""
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True)
    image = io.BytesIO()
    Image.new("RGB", (1, 1)).save(image, "png")
    lines = []
    for index in range(num_rows):
        paths = {name: f"{name}/{index}.png" for name in ("source", "target")}
        for path in paths.values():
            # What follows a PNG's end is no part of the picture, but of the file.
            (folder / path).write_bytes(image.getvalue() + path.encode())
        number = index % max(1, int(num_rows * DISTINCT))
        lines.append(json.dumps({**paths, "prompt": f"caption {number} of a photograph"}) + "\n")
    (folder / "prompt.json").write_text("".join(lines))
    time.sleep(SETTLED_NS / 1e9)  # until their times tell of changes


def peak_gb() -> float:
    """Return the peak of this process's resident memory in GB."""
    status = Path("/proc/self/status").read_text()
    if "RssAnon" not in status:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1e6


@click.command(context_settings=CONTEXT)
@click.option("--rows", default=10_000_000, show_default=True)
@click.option("--files", is_flag=True, help="Plan real files, two for each row.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    help="benchmarks/results/planning.json, or planning_files.json, if absent.",
)
def main(rows: int, files: bool, folder: Path | None, results: Path | None) -> None:
    """Measure the planning of ROWS rows."""
    if folder is not None:  # in a process of its own, whose memory is planning's alone
        click.echo(json.dumps((measure_files if files else measure)(rows, folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        if not files:
            for edition in (0, 1):
                write_digests(Path(name) / f"hashes{edition}.npy", InventedRows(rows, edition))
        arguments = ["-m", "benchmarks.planning", "--rows", str(rows), "--folder", name]
        arguments += ["--files"] if files else []
        done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    figures = {**measured, "machine": machine(), "versions": versions(), "commit": commit()}
    kind = "_files" if files else ""
    results = results or Path(f"benchmarks/results/planning{kind}.json")
    write_text(results, json.dumps(figures, indent=1, sort_keys=True) + "\n")
    (print_files if files else print_invented)(measured)


def print_files(figures: dict[str, Any]) -> None:
    """Print what planning of real files took."""
    for number in ("first", "again"):
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures[number].items())
        click.echo(
            f"{number}: {figures[f'{number}_us_a_row']:.1f} us a row ({parts} s), "
            f"{figures[f'{number}_peak_gb']:.2f} GB"
        )


def print_invented(figures: dict[str, Any]) -> None:
    """Print what planning of invented rows took."""
    for part, seconds in figures["seconds"].items():
        click.echo(f"{part:18s} {seconds:7.1f} s")
    click.echo(
        f"{figures['rows']} rows, {figures['prompts']} prompts, {figures['shards']} shards: "
        f"{figures['total_s']:.1f} s, {figures['peak_gb']:.2f} GB"
    )
    click.echo(
        f"again, the first of {CHANGED} parts changed: {figures['again_s']:.1f} s, "
        f"{figures['again_peak_gb']:.2f} GB; shards as they were: {figures['again_same_shards']}"
    )


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.planning")
