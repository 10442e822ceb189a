"""`python -m benchmarks.train_step`: speed and memory of a training step at a base's true size.

Weights are random, the cache is made up, and the step is the one that `python -m train` takes. One
row for each option alone, for each card's preset, and for sizes and batches of the plain setting.
A row has samples a second; the floating point operations that the step needs, recomputation left
out, over those that the device reaches in large matrix products; and the peak of memory beside the
estimate of `--estimate`. It takes less than nine minutes on a GPU. `--tiny` measures a miniature on
any machine; `--predict` estimates the memory without a GPU, and counts what a step executes beside
what it needs, and beside the step of diffusers' script.
"""

import gc
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.bases import TRANSFORMERS, VAE, train_settings
from benchmarks.counts import count_reference_step, count_step, needed_flops, table
from benchmarks.flops import count_step_flops, measure_matrix_rate
from benchmarks.memory_chart import draw_memory
from benchmarks.random_weights import save_transformer
from benchmarks.synthetic import Shape, write_cache
from benchmarks.timed_steps import time_steps
from common.atomic_files import write_text
from common.cards import card_names, settings_with
from common.command import CONTEXT, user_errors
from common.errors import ConfigError, RunError
from common.provenance import commit, machine, versions
from train.config import TrainConfig
from train.memory.estimate import find_sizes
from train.memory.simulation import simulate

IMAGES = 16
SECONDS, SECONDS_TINY = 3.0, 0.1  # in which a row's steps are measured
TINY: dict[str, Any] = TRANSFORMERS["sd3-medium"] | {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 80,
    "pos_embed_max_size": 32,
}
PLAIN: dict[str, Any] = {
    "mixed_precision": "bf16",
    "train_batch_size": 1,
    "validation_steps": 0,
    "report_to": "none",
    "allow_tf32": True,
    "dataloader_num_workers": 2,
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing controlnet": {"checkpointing": "controlnet"},
    "checkpointing selective": {"checkpointing": "selective"},
    "checkpointing full": {"checkpointing": "full"},
    "8 bit AdamW": {"optimizer": "adamw8bit"},
    "base in int8": {"quantize_base": "int8"},
    "base in fp8": {"quantize_base": "fp8"},
    "base in nf4": {"quantize_base": "nf4"},
    "fused backward pass": {"fused_backward_pass": True, "max_grad_norm": 0.0},
    "bf16 weights": {"bf16_weights": True},
    "offloaded optimiser": {"offload_optimizer": True},
    "4 base blocks offloaded": {"offload_base": 4},
    "offloaded activations": {"offload_activations": True},
    "deterministic": {"deterministic": True},
    "6 ControlNet blocks": {"num_controlnet_layers": 6},
    "int8, bf16 weights, 8 bit AdamW": {
        "quantize_base": "int8",
        "bf16_weights": True,
        "optimizer": "adamw8bit",
    },
    "compiled": {"compile": True},
}
REFERENCE = "train_controlnet_sd3.py"  # with its --gradient_checkpointing
SIZES = [(px, batch) for px in (512, 1024) for batch in (1, 4, 8)]


@dataclass(frozen=True)
class Row:
    """Settings to measure.

    Attributes:
        name: name of the row.
        px: side of the pictures.
        settings: settings of training that differ from `PLAIN`.
    """

    name: str
    px: int
    settings: dict[str, Any]


@click.command(context_settings=CONTEXT)
@click.option(
    "--base", type=click.Choice(list(TRANSFORMERS)), default="sd3-medium", show_default=True
)
@click.option("--tiny", is_flag=True, help="A miniature at 256 px, on any machine.")
@click.option("--predict", is_flag=True, help="Estimate memory and count; no step is taken.")
@click.option("--only", help="Rows whose name has this in it.")
@click.option(
    "--keep", is_flag=True, help="Keep the rows that the JSON file has from this code and machine."
)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    help="benchmarks/results/train_step_BASE.json if absent.",
)
@click.option(
    "--chart", type=click.Path(path_type=Path), help="A PNG of the memory, with the reference's."
)
def main(
    base: str,
    tiny: bool,
    predict: bool,
    only: str | None,
    keep: bool,
    results: Path | None,
    chart: Path | None,
) -> None:
    """Measure every row, print a table, write JSON and draw a chart."""
    if chart is not None and only is not None:
        raise click.UsageError("--chart: shows what --only leaves out; give one of them.")
    if not (tiny or predict) and not torch.cuda.is_available():
        raise click.UsageError("no GPU here; --tiny tries this on a miniature.")
    name = "tiny" if tiny else base
    kind = "_predicted" if predict else ""
    results = results or Path(f"benchmarks/results/train_step_{name}{kind}.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    transformer = TINY if tiny else TRANSFORMERS[base]
    figures: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "base": name,
        "matrix_tflops": None if predict else measure_matrix_rate() / 1e12,
        "rows": [],
    }
    known = read_rows(results, figures) if keep else {}
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        save_transformer(Path(folder) / "base", transformer, weights=not predict)
        rate = figures["matrix_tflops"]
        click.echo(f"{machine()}, {name}, {rate or 0:.1f} TFLOP/s in matrix products")
        seconds = SECONDS_TINY if tiny else SECONDS
        needed: dict[tuple[int, int], int] = {}
        for row in (*rows(name), *(reference_rows(name) if predict else ())):
            if only is None or only in row.name:
                measured = known.get((row.name, row.px)) or measure(
                    row, Path(folder), transformer, rate, seconds, needed
                )
                figures["rows"].append(measured)
                click.echo(format_row(measured))
                write_text(results, json.dumps(figures, indent=1) + "\n")
    if predict:
        click.echo("\n" + table(figures["rows"]))
    if chart is not None:
        draw_memory(figures["rows"], chart, name)


def read_rows(path: Path, figures: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the rows of an earlier run, by name and size, if it was like this one.

    Args:
        path: JSON file of the earlier run.
        figures: what this one says of itself.
    """
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    alike = ("machine", "versions", "commit", "base")
    if any(found[name] != figures[name] for name in alike):
        return {}
    return {(row["name"], row["px"]): row for row in found["rows"]}


def rows(base: str) -> Iterator[Row]:
    """Yield the rows to measure.

    The miniature, `tiny`, has one size and one card, and compiles nothing: that takes a CPU
    minutes.
    """
    tiny = base == "tiny"
    usual = 256 if tiny else 1024
    for px, batch in [(usual, 1)] if tiny else SIZES:
        yield Row(f"plain, batch {batch}", px, {"train_batch_size": batch})
    for name, settings in FLAGS.items():
        if name != "plain" and not (tiny and "compile" in settings):
            yield Row(name, usual, settings)
    run = train_settings("sd3-medium" if tiny else base)
    batches = {name: run[name] for name in ("train_batch_size", "gradient_accumulation_steps")}
    for card in card_names()[::-1][: 1 if tiny else None]:
        settings = batches | settings_with(card, "train", TrainConfig)
        yield Row(f"card of {card.removesuffix('gb')} GB", usual, settings)


def reference_rows(base: str) -> Iterator[Row]:
    """Yield a row that stands for diffusers' script; none of its settings are ours."""
    yield Row(REFERENCE, 256 if base == "tiny" else 1024, {"checkpointing": "controlnet"})


def prepare_config(row: Row, folder: Path, transformer: dict[str, Any]) -> TrainConfig:
    """Return a row's training settings; write the cache that they name where it is missing."""
    side = row.px // 8
    cache = folder / f"cache{side}"
    if not cache.exists():
        width = int(transformer["joint_attention_dim"])
        pooled = int(transformer["pooled_projection_dim"])
        shape = Shape(side, clip_width=width // 2, t5_width=width, pooled_width=pooled)
        write_cache(cache, shape, 1, IMAGES)
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder / "base"),
        cache=(str(cache),),
        output_dir=folder / "out",
    )
    return replace(config, **PLAIN | row.settings)


def measure(
    row: Row,
    folder: Path,
    transformer: dict[str, Any],
    matrix_tflops: float | None,
    most_seconds: float = SECONDS,
    needed: dict[tuple[int, int], int] | None = None,
) -> dict[str, Any]:
    """Return a row's figures, or the reason why there are none.

    Args:
        row: settings to measure.
        folder: folder of the base model, caches and output.
        transformer: configuration of the base's transformer.
        matrix_tflops: rate of matrix products; None to take no step.
        most_seconds: time that steps are measured for.
        needed: operations that a sample needs, by size of pictures and number of blocks; what is
            missing is added.
    """
    figures: dict[str, Any] = {"name": row.name, "px": row.px}
    needed = {} if needed is None else needed
    try:
        config = prepare_config(row, folder, transformer)
        sizes = find_sizes(config)
        figures["samples"] = config.train_batch_size * config.gradient_accumulation_steps
        if matrix_tflops is None:
            if row.name == REFERENCE:
                counts = count_reference_step(replace(sizes, vae=VAE))
            else:
                figures["estimated_bytes"], counts = count_step(config, sizes)
            key = row.px, int(sizes.controlnet["num_layers"])
            if key not in needed:
                needed[key] = needed_flops(config, sizes)
            return figures | asdict(counts) | {"needed_flops": needed[key]}
        figures["estimated_bytes"] = simulate(config, sizes).step
        seconds, figures["measured_bytes"] = time_steps(config, most_seconds)
        tflops = count_step_flops(config, sizes) / 1e12 / seconds
        figures |= {
            "seconds_per_step": seconds,
            "samples_per_second": figures["samples"] / seconds,
            "tflops": tflops,
            "of_matrix_rate": tflops / matrix_tflops,
        }
    except torch.OutOfMemoryError:
        figures["failed"] = "out of memory"
    except (ConfigError, RunError, ImportError, RuntimeError) as error:
        # What this card or its libraries cannot do is no reason to lose the other rows.
        figures["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return figures


def format_row(figures: dict[str, Any]) -> str:
    """Return a row's figures as a line of text."""
    head = f"{figures['name']:32} {figures['px']:5} px"
    if "failed" in figures:
        return f"{head}  {figures['failed']}"
    estimated = sum(figures.get("estimated_bytes", {}).values())
    if "measured_bytes" not in figures:
        ratio = figures["flops"] / figures["needed_flops"]
        return (
            f"{head} x {figures['samples']}  {estimated / 1e9:6.2f} GB  "
            f"{figures['flops'] / 1e12:7.2f} TFLOP a sample, {ratio:.2f} of what it needs"
        )
    measured = figures["measured_bytes"]
    return (
        f"{head} x {figures['samples']}  {figures['samples_per_second']:6.2f} samples/s "
        f"{figures['tflops']:7.1f} TFLOP/s {figures['of_matrix_rate']:5.0%}  "
        f"{measured / 1e9:6.2f} GB, estimate {estimated / measured:.2f} of it"
    )


if __name__ == "__main__":
    main()
