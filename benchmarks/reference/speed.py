"""`python -m benchmarks.reference.speed --reference-script PATH`: our time and memory beside its.

PATH is a copy of diffusers' examples/controlnet/train_controlnet_sd3.py, which is no part of this
project. Both programs train with the same settings, pictures and base with random weights, each in
its own process, one after the other: a first time from nothing, and a second time from the files
that each has cached. On a GPU `--base sd3-medium` takes encoders, VAE and transformer at their true
size: with `--batch 1 --px 1024` the reference needs about 40 GB of memory, and 20 GB of disk.
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
from benchmarks.random_weights import save_encoders, save_index, save_transformer
from benchmarks.reference.runs import flags, reference_flags, run_python, write_data
from common.atomic_files import write_text
from common.command import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.base_model.pipeline import build_pipeline, save_base

# The reference's ControlNet always has 12 blocks; ours has at most half as many as the base.
NUM_BLOCKS, CONTROLNET_BLOCKS = 24, 12
SEED, TOKENS = 0, 77
WARM_UP = 5  # steps that are not timed


@dataclass(frozen=True)
class Workload:
    """What both programs train.

    Attributes:
        base: `miniature`, in SD3's proportions, or the name of a base in `benchmarks.bases`.
        rows: number of pictures.
        px: side of the pictures.
        batch: pictures in a step.
        steps: training steps.
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
    **options: Any,
) -> None:
    """Train twice with each program; print a table, write JSON and draw a chart."""
    workload = Workload(**options)
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        compared = compare(reference_script.absolute(), workload, work_dir or Path(temporary))
    content = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        **vars(workload),
        **compared,
    }
    results = results or Path(f"benchmarks/results/against_reference_{workload.base}.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(content, indent=1) + "\n")
    click.echo(f"{'':40}{'reference':>12}{'ours':>12}{'ours / reference':>20}")
    for name in compared["reference"]:
        theirs, ours = compared["reference"][name], compared["ours"][name]
        if theirs is not None and ours is not None:
            click.echo(f"{name:40}{theirs:12,.2f}{ours:12,.2f}{ours / theirs:20.2f}")
    if chart is not None:
        draw_ratios(compared, chart)


def compare(script: Path, workload: Workload, folder: Path) -> dict[str, Any]:
    """Return the figures of both programs.

    Args:
        script: the reference.
        workload: what to train.
        folder: where data, caches and runs are written.
    """
    for name in ("datasets", "our-datasets", "reference1", "reference2", "ours1", "ours2", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)  # of an earlier run
    write_data(folder / "data", workload.rows, SEED)
    write_base(folder / "base", workload.base)
    reference = [_train_reference(script, workload, folder, number) for number in (1, 2)]
    precompute_seconds = _precompute(workload, folder)
    ours = [_train_ours(workload, folder, number) for number in (1, 2)]
    arrow = sum(path.stat().st_size for path in (folder / "datasets").rglob("cache-*.arrow"))
    shards = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    return {
        "reference": summarize_runs(reference, 0.0, arrow),
        "ours": summarize_runs(ours, precompute_seconds, shards),
    }


def _shared_settings(workload: Workload, folder: Path) -> dict[str, Any]:
    """Return the training settings that both programs have."""
    return {
        "pretrained_model_name_or_path": folder / "base",
        "train_batch_size": workload.batch,
        "max_train_steps": workload.steps,
        "learning_rate": 1e-5,
        "seed": SEED,
        "mixed_precision": "bf16" if torch.cuda.is_available() else "no",
        "report_to": "tensorboard",
        "checkpointing_steps": workload.steps,
    }


def _train_reference(script: Path, workload: Workload, folder: Path, number: int) -> dict[str, Any]:
    arguments = reference_flags(
        **_shared_settings(workload, folder),
        train_data_dir=folder / "data",
        cache_dir=folder / "datasets",
        resolution=workload.px,
        max_sequence_length=TOKENS,
        output_dir=folder / f"reference{number}",
    )
    return run_watched(script, arguments)


def _precompute(workload: Workload, folder: Path) -> float:
    """Make our cache; return the seconds that it took."""
    start = time.time()
    run_python(
        *("-m", "precompute"),
        *flags(
            pretrained_model_name_or_path=folder / "base",
            train_data_dir=folder / "data",
            cache=folder / "cache",
            cache_dir=folder / "our-datasets",
            resolution=workload.px,
            max_sequence_length=TOKENS,
        ),
    )
    return time.time() - start


def _train_ours(workload: Workload, folder: Path, number: int) -> dict[str, Any]:
    arguments = flags(
        **_shared_settings(workload, folder),
        cache=folder / "cache",
        num_controlnet_layers=CONTROLNET_BLOCKS,
        pooled_projection="prompt",  # as the script trains
        validation_steps=0,
        logging_steps=1,
        output_dir=folder / f"ours{number}",
    )
    return run_watched("train", arguments)


def summarize_runs(
    runs: list[dict[str, Any]], before: float, cached: int
) -> dict[str, float | None]:
    """Return the figures that are compared.

    Args:
        runs: results of `run_watched` for the first run and the second.
        before: seconds of an earlier stage.
        cached: bytes on disk.
    """
    first, second = runs
    step_seconds = [
        later - earlier
        for run in runs
        for earlier, later in zip(run["times"][WARM_UP:], run["times"][WARM_UP + 1 :], strict=False)
    ]
    device = second["device_bytes"]
    return {
        "seconds to the first step, first start": before + first["times"][0] - first["start"],
        "seconds to the first step, second start": second["times"][0] - second["start"],
        "steps a second": 1 / statistics.median(step_seconds),
        "most host memory, GB": second["host_bytes"] / 1e9,
        "most device memory, GB": None if device is None else device / 1e9,
        "cached on disk, MB": cached / 1e6,
    }


def draw_ratios(compared: dict[str, dict[str, float | None]], path: Path) -> None:
    """Draw each figure of ours over the reference's.

    Args:
        compared: figures of `reference` and of `ours`.
        path: file of the PNG.
    """
    ratios = {
        name: ours / theirs
        for name, theirs in compared["reference"].items()
        if theirs is not None and (ours := compared["ours"][name]) is not None
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


def run_watched(program: Path | str, arguments: list[str]) -> dict[str, Any]:
    """Run a training program; return its `start` and what `benchmarks.reference.watch` records."""
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        start = time.time()
        run_python("-m", "benchmarks.reference.watch", figures, program, *arguments)
        return {"start": start, **json.loads(figures.read_text())}


def write_base(folder: Path, name: str) -> None:
    """Save a base with random weights.

    The miniature is as narrow as the tests', with SD3's proportions: CLIP's embeddings are half as
    wide as T5's, and prompts have as many tokens.
    """
    if name == "miniature":
        pipeline = build_pipeline(
            SEED, num_layers=NUM_BLOCKS, clip_widths=(96, 160), t5_width=512, clip_tokens=TOKENS
        )
        save_base(folder, pipeline)
        return
    save_encoders(folder, dtype=torch.bfloat16)
    save_transformer(folder, TRANSFORMERS[name])
    save_index(folder)


if __name__ == "__main__":
    main()
