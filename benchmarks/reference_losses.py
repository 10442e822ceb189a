"""`python -m benchmarks.reference_losses --reference-script PATH`: our losses beside its own.

PATH is a copy of diffusers' examples/controlnet/train_controlnet_sd3.py, which is no part of this
project. Both train on the same miniature base with random weights, data, seed and settings, in
float32 and processes of their own; the order of samples, noise, timesteps and posterior samples
that ours draws are handed to the reference (see `benchmarks.reference_shim`).
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
from xxhash import xxh3_128_hexdigest

from benchmarks.reference import flags, logged_losses, reference_flags, run, write_data
from common.atomic_files import write_text
from common.options import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.base_model.pipeline import build_pipeline, save_base
from shards.reading.cache import Cache
from shards.reading.order import Order
from train import objective
from train.data import TrainingSamples

# The reference's ControlNet always has 12 blocks, and ours at most half as many as the base.
NUM_BLOCKS, CONTROLNET_BLOCKS = 24, 12
NUM_ROWS, BATCH, STEPS, TOKENS, RESOLUTION_PX, SEED = 24, 4, 20, 77, 64, 0
LEARNING_RATE = 1e-3
LIMIT = 1e-3
SAME = {
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
    # Both in float32; a GPU would compute other sums.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        found = compare(reference_script.absolute(), work_dir or Path(temporary))
    figures = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "steps": STEPS,
        "blocks": NUM_BLOCKS,
        "batch": BATCH,
        **found,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(figures, indent=1) + "\n")
    worst = 0.0
    for setting, both in found.items():
        click.echo(f"{setting}\n  step  reference       ours   relative difference")
        for step, (theirs, ours) in enumerate(zip(both["reference"], both["ours"], strict=True), 1):
            click.echo(f"  {step:4d}  {theirs:.7f}  {ours:.7f}  {abs(ours / theirs - 1):.1e}")
        click.echo(f"  largest: {both['largest_relative_difference']:.1e}, limit {LIMIT:.0e}")
        worst = max(worst, both["largest_relative_difference"])
    ctx.exit(int(worst > LIMIT))


def compare(script: Path, folder: Path) -> dict[str, Any]:
    """Return the losses of both, by setting.

    Args:
        script: the reference.
        folder: to work in.
    """
    data, base, cache = folder / "data", folder / "base", folder / "cache"
    write_data(data, NUM_ROWS, SEED)
    save_base(base, build_pipeline(SEED, num_layers=NUM_BLOCKS, clip_tokens=77))
    run(
        "-m",
        "precompute",
        *flags(
            pretrained_model_name_or_path=base,
            train_data_dir=data,
            cache=cache,
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
    draws = folder / "draws.npz"
    np.savez(draws, **handed_over(cache, data))
    found = {}
    for setting in (1, 0):
        name = f"precondition_outputs={setting}"
        ours, theirs = folder / f"ours-{setting}", folder / f"reference-{setting}"
        common = SAME | {"pretrained_model_name_or_path": base, "precondition_outputs": setting}
        run(
            "-m",
            "train",
            *flags(
                **common,
                cache=cache,
                output_dir=ours,
                num_controlnet_layers=CONTROLNET_BLOCKS,
                validation_steps=0,
                logging_steps=1,
            ),
        )
        losses = folder / f"losses-{setting}.json"
        arguments = reference_flags(
            **common,
            train_data_dir=data,
            cache_dir=folder / "datasets",
            output_dir=theirs,
            resolution=RESOLUTION_PX,
            max_sequence_length=TOKENS,
        )
        run("-m", "benchmarks.reference_shim", script, draws, losses, *arguments)
        found[name] = beside(json.loads(losses.read_text()), logged_losses(ours))
    return found


def beside(reference: list[float], ours: list[float]) -> dict[str, Any]:
    """Return both lists of losses and how far apart they are at most."""
    assert len(reference) == len(ours) == STEPS, (len(reference), len(ours))
    differences = [abs(one / other - 1) for one, other in zip(ours, reference, strict=True)]
    return {
        "reference": reference,
        "ours": ours,
        "largest_relative_difference": max(differences),
    }


def handed_over(cache: Path, data: Path) -> dict[str, Any]:
    """Return what training draws for its first steps, as `benchmarks.reference_shim` takes it."""
    opened = Cache(cache)
    samples = TrainingSamples(
        opened,
        Order(opened.manifest.training_records("conditioning"), seed=SEED),
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
        record = samples.order.record(place)
        samples.draw(draws, place, place, num_prompts=1)
        order.append(rows[str(opened.conditioning.about(*record)["image_hash"])])
    density = objective.timestep_density(
        memory.draws["uniform"], memory.draws["normal"], "logit_normal"
    )
    found = {
        "rows": np.array(order),
        "density": density.numpy(),
        **{name: draws[name] for name in samples.drawn_latents},
    }
    return {name: array.reshape(STEPS, BATCH, *array.shape[1:]) for name, array in found.items()}


if __name__ == "__main__":
    main()
