"""`python -m benchmarks.reference.losses --reference-script PATH`: our losses beside diffusers'.

PATH is a copy of diffusers' examples/controlnet/train_controlnet_sd3.py, which is no part of this
project. Both programs train in float32 with the same miniature base, data, seed and settings, each
in its own process. The order of samples, noise, timesteps and posterior samples that ours draws are
given to the reference (see `benchmarks.reference.shim`).
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from xxhash import xxh3_128_hexdigest

from benchmarks.reference.runs import (
    flags,
    logged_losses,
    reference_flags,
    run_python,
    write_data,
)
from common.atomic_files import write_text
from common.command import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.base_model.pipeline import build_pipeline, save_base
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from train import objective
from train.data import TrainingSamples

# The reference's ControlNet always has 12 blocks; ours has at most half as many as the base.
NUM_BLOCKS, CONTROLNET_BLOCKS = 24, 12
NUM_ROWS, BATCH, STEPS, TOKENS, RESOLUTION_PX, SEED = 24, 4, 20, 77, 64, 0
LEARNING_RATE = 1e-3
LIMIT = 1e-3  # largest relative difference of two losses
SHARED_SETTINGS = {
    "train_batch_size": BATCH,
    "max_train_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "seed": SEED,
    "mixed_precision": "no",
    "report_to": "tensorboard",
}


@click.command(context_settings=CONTEXT)
@click.option(
    "--reference-script",
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option(
    "--work-dir", type=click.Path(path_type=Path), help="Kept; a temporary one if absent."
)
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/reference_losses.json"),
    show_default=True,
)
@click.pass_context
def main(ctx: click.Context, reference_script: Path, work_dir: Path | None, results: Path) -> None:
    """Compare the losses of the first 20 steps; exit 1 where they are 0.1 % apart."""
    # On a GPU, sums in float32 come out differently.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        losses = compare(reference_script.absolute(), work_dir or Path(temporary))
    figures = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "steps": STEPS,
        "blocks": NUM_BLOCKS,
        "batch": BATCH,
        **losses,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(figures, indent=1) + "\n")
    worst = 0.0
    for setting, both in losses.items():
        click.echo(f"{setting}\n  step  reference       ours   relative difference")
        for step, (theirs, ours) in enumerate(zip(both["reference"], both["ours"], strict=True), 1):
            click.echo(f"  {step:4d}  {theirs:.7f}  {ours:.7f}  {abs(ours / theirs - 1):.1e}")
        click.echo(f"  largest: {both['largest_relative_difference']:.1e}, limit {LIMIT:.0e}")
        worst = max(worst, both["largest_relative_difference"])
    ctx.exit(int(worst > LIMIT))


def compare(script: Path, folder: Path) -> dict[str, Any]:
    """Return the losses of both programs, by setting.

    Args:
        script: the reference.
        folder: where data, cache and runs are written.
    """
    write_data(folder / "data", NUM_ROWS, SEED)
    save_base(folder / "base", build_pipeline(SEED, num_layers=NUM_BLOCKS, clip_tokens=77))
    _precompute(folder)
    draws = folder / "draws.npz"
    np.savez(draws, **training_draws(folder / "cache", folder / "data"))
    losses = {}
    for setting in (1, 0):
        ours = _train_ours(folder, setting)
        reference = _train_reference(script, folder, draws, setting)
        losses[f"precondition_outputs={setting}"] = differences(reference, ours)
    return losses


def _precompute(folder: Path) -> None:
    run_python(
        "-m",
        "precompute",
        *flags(
            pretrained_model_name_or_path=folder / "base",
            train_data_dir=folder / "data",
            cache=folder / "cache",
            cache_dir=folder / "datasets",
            resolution=RESOLUTION_PX,
            max_sequence_length=TOKENS,
            conditioning_range="0_1",
            posterior="mean_std",
            cache_dtype="float32",
            text_dtype="float32",
            device="cpu",
        ),
    )


def _train_ours(folder: Path, precondition_outputs: int) -> list[float]:
    """Train with our program; return its losses."""
    output_dir = folder / f"ours-{precondition_outputs}"
    run_python(
        "-m",
        "train",
        *flags(
            **SHARED_SETTINGS,
            pretrained_model_name_or_path=folder / "base",
            precondition_outputs=precondition_outputs,
            cache=folder / "cache",
            output_dir=output_dir,
            num_controlnet_layers=CONTROLNET_BLOCKS,
            pooled_projection="prompt",  # as the script trains
            validation_steps=0,
            logging_steps=1,
        ),
    )
    return logged_losses(output_dir)


def _train_reference(
    script: Path, folder: Path, draws: Path, precondition_outputs: int
) -> list[float]:
    """Train with the reference, on our draws; return its losses."""
    losses = folder / f"losses-{precondition_outputs}.json"
    arguments = reference_flags(
        **SHARED_SETTINGS,
        pretrained_model_name_or_path=folder / "base",
        precondition_outputs=precondition_outputs,
        train_data_dir=folder / "data",
        cache_dir=folder / "datasets",
        output_dir=folder / f"reference-{precondition_outputs}",
        resolution=RESOLUTION_PX,
        max_sequence_length=TOKENS,
    )
    run_python("-m", "benchmarks.reference.shim", script, draws, losses, *arguments)
    values: list[float] = json.loads(losses.read_text())
    return values


def differences(reference: list[float], ours: list[float]) -> dict[str, Any]:
    """Return both lists of losses and their largest relative difference."""
    assert len(reference) == len(ours) == STEPS, (len(reference), len(ours))
    relative = [abs(mine / theirs - 1) for mine, theirs in zip(ours, reference, strict=True)]
    return {"reference": reference, "ours": ours, "largest_relative_difference": max(relative)}


def training_draws(cache: Path, data: Path) -> dict[str, Any]:
    """Return the draws of our training's first steps, as `benchmarks.reference.shim` takes them."""
    opened = Cache(cache)
    samples = TrainingSamples(
        [opened],
        unmixed(Order(opened.manifest.training_records("conditioning"), seed=SEED)),
        seed=SEED,
        proportion_empty_prompts=0.0,
    )
    rows = {
        xxh3_128_hexdigest((data / f"target/{number}.png").read_bytes()): number
        for number in range(NUM_ROWS)
    }
    count = STEPS * BATCH
    memory = samples.allocate(count)
    draws = {name: tensor.numpy() for name, tensor in memory.draws.items()}
    order = []
    for place in range(count):
        _, *record = samples.order.record(place)
        samples.draw(draws, place, place, num_prompts=1)
        order.append(rows[str(opened.conditioning.metadata(*record)["image_hash"])])
    density = objective.timestep_density(
        memory.draws["uniform"], memory.draws["normal"], "logit_normal"
    )
    arrays = {
        "rows": np.array(order),
        "density": density.numpy(),
        **{name: draws[name] for name in samples.drawn_latents},
    }
    return {name: array.reshape(STEPS, BATCH, *array.shape[1:]) for name, array in arrays.items()}


if __name__ == "__main__":
    main()
