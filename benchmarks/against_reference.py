"""`python -m benchmarks.against_reference --reference-script PATH`: the whole job beside its own.

PATH is a copy of diffusers' examples/controlnet/train_controlnet_sd3.py, which is no part of this
project. Both train with the same settings on the same pictures and base, weights at random, in
processes of their own, one after the other: once from nothing, and once more when each has cached
what it caches. On a GPU `--base sd3-medium` takes encoders, VAE and transformer at their true size:
with `--batch 1 --px 1024` the reference needs about 40 GB, and 20 GB of disk.
"""

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure

from benchmarks.bases import TRANSFORMERS
from benchmarks.encoders import save_true_size
from benchmarks.reference import flags, reference_flags, run, write_data
from benchmarks.train_step import save_random
from common.atomic_files import write_text
from common.options import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.base_model.pipeline import build_pipeline, save_base

# The reference's ControlNet always has 12 blocks, and ours at most half as many as the base.
NUM_BLOCKS, CONTROLNET_BLOCKS = 24, 12
SEED, TOKENS = 0, 77
WARM_UP = 5


@dataclass(frozen=True)
class Job:
    """What both are to do.

    Attributes:
        base: `miniature`, in SD3's proportions, or the name of a base in `benchmarks.bases`.
        rows: pictures to train on.
        px: their side.
        batch: of training.
        steps: to take.
    """

    base: str
    rows: int
    px: int
    batch: int
    steps: int


@click.command(context_settings=CONTEXT)
@click.option(
    "--reference-script",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option(
    "--base",
    type=click.Choice(["miniature", *TRANSFORMERS]),
    default="miniature",
    show_default=True,
)
@click.option("--rows", default=256, show_default=True, help="Pictures to train on.")
@click.option("--px", default=128, show_default=True, help="Their side.")
@click.option("--batch", default=4, show_default=True)
@click.option("--steps", default=60, show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Kept; temporary if absent.")
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    help="benchmarks/results/against_reference_BASE.json if absent.",
)
@click.option(
    "--chart", type=click.Path(path_type=Path), help="A PNG of ours over the reference's."
)
def main(
    reference_script: Path,
    work_dir: Path | None,
    results: Path | None,
    chart: Path | None,
    **job: Any,
) -> None:
    """Do the whole job twice, by each; print a table, write JSON and draw a chart."""
    wanted = Job(**job)
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        found = compare(reference_script.absolute(), wanted, work_dir or Path(temporary))
    figures = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        **vars(wanted),
        **found,
    }
    results = results or Path(f"benchmarks/results/against_reference_{wanted.base}.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(figures, indent=1) + "\n")
    click.echo(f"{'':40}{'reference':>12}{'ours':>12}{'ours / reference':>20}")
    for name in found["reference"]:
        theirs, ours = found["reference"][name], found["ours"][name]
        if theirs is not None and ours is not None:
            click.echo(f"{name:40}{theirs:12,.2f}{ours:12,.2f}{ours / theirs:20.2f}")
    if chart is not None:
        draw(found, chart)


def compare(script: Path, job: Job, folder: Path) -> dict[str, Any]:
    """Return the figures of both.

    Args:
        script: the reference.
        job: what is to be done.
        folder: to work in.
    """
    for name in ("datasets", "our-datasets", "reference1", "reference2", "ours1", "ours2", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier run
    data, base, cache = folder / "data", folder / "base", folder / "cache"
    write_data(data, job.rows, SEED)
    write_base(base, job.base)
    on_gpu = torch.cuda.is_available()
    common = {
        "pretrained_model_name_or_path": base,
        "train_batch_size": job.batch,
        "max_train_steps": job.steps,
        "learning_rate": 1e-5,
        "seed": SEED,
        "mixed_precision": "bf16" if on_gpu else "no",
        "report_to": "tensorboard",
        "checkpointing_steps": job.steps,
    }
    theirs = common | {
        "train_data_dir": data,
        "cache_dir": folder / "datasets",
        "resolution": job.px,
        "max_sequence_length": TOKENS,
    }
    reference = [
        watched(script, reference_flags(**theirs, output_dir=folder / f"reference{number}"))
        for number in (1, 2)
    ]
    start = time.time()
    run(
        *("-m", "precompute"),
        *flags(
            pretrained_model_name_or_path=base,
            train_data_dir=data,
            cache=cache,
            cache_dir=folder / "our-datasets",
            resolution=job.px,
            max_sequence_length=TOKENS,
        ),
    )
    precompute_seconds = time.time() - start
    mine = common | {
        "cache": cache,
        "num_controlnet_layers": CONTROLNET_BLOCKS,
        "validation_steps": 0,
        "logging_steps": 1,
    }
    ours = [
        watched("train", flags(**mine, output_dir=folder / f"ours{number}")) for number in (1, 2)
    ]
    arrow = sum(path.stat().st_size for path in (folder / "datasets").rglob("cache-*.arrow"))
    shards = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {
        "reference": figures(reference, 0.0, arrow),
        "ours": figures(ours, precompute_seconds, shards),
    }


def figures(runs: list[dict[str, Any]], before: float, cached: int) -> dict[str, float | None]:
    """Return what is compared, of a first and a second run.

    Args:
        runs: see `watched`.
        before: seconds of an earlier stage.
        cached: bytes on disk.
    """
    first, second = runs
    steps = [
        later - earlier
        for one in runs
        for earlier, later in zip(one["times"][WARM_UP:], one["times"][WARM_UP + 1 :], strict=False)
    ]
    device = second["device_bytes"]
    return {
        "seconds to the first step, first start": before + first["times"][0] - first["start"],
        "seconds to the first step, second start": second["times"][0] - second["start"],
        "steps a second": 1 / statistics.median(steps),
        "most host memory, GB": second["host_bytes"] / 1e9,
        "most device memory, GB": None if device is None else device / 1e9,
        "cached on disk, MB": cached / 1e6,
    }


def draw(found: dict[str, dict[str, float | None]], path: Path) -> None:
    """Draw each figure of ours over the reference's.

    Args:
        found: figures of both, see `compare`.
        path: of the PNG.
    """
    ratios = {
        name: ours / theirs
        for name, theirs in found["reference"].items()
        if theirs is not None and (ours := found["ours"][name]) is not None
    }
    figure = Figure(figsize=(8, 0.4 * len(ratios) + 1), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(ratios), list(ratios.values()))
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("ours / train_controlnet_sd3.py")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def watched(program: Path | str, arguments: list[str]) -> dict[str, Any]:
    """Run a training program and return when it began and what `benchmarks.watched` noted."""
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "figures.json"
        start = time.time()
        run("-m", "benchmarks.watched", noted, program, *arguments)
        return {"start": start, **json.loads(noted.read_text())}


def write_base(folder: Path, name: str) -> None:
    """Save a base with random weights.

    The miniature is as narrow as the tests', but SD3 in its proportions: CLIP's embeddings are half
    as wide as T5's, and prompts have as many tokens.
    """
    if name == "miniature":
        pipeline = build_pipeline(
            SEED, num_layers=NUM_BLOCKS, clip_widths=(96, 160), t5_width=512, clip_tokens=TOKENS
        )
        save_base(folder, pipeline)
        return
    save_true_size(folder, dtype=torch.bfloat16)
    save_random(folder, TRANSFORMERS[name])
    miniature = folder.with_name("miniature")
    save_base(miniature, build_pipeline(SEED))
    shutil.copy(miniature / "model_index.json", folder)


if __name__ == "__main__":
    main()
