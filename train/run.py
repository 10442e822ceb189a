"""Stage 2 from front to back: networks, loop, the trained ControlNet."""

import contextlib
import os
import sys
from collections.abc import Iterator
from signal import SIGTERM

import click
import torch

from common.errors import RunError
from common.options import as_dict
from common.provenance import write_run
from sd3.pretrained import DATA_KEY
from train import checkpoints, publish
from train.assembly import Run, assemble
from train.config import TrainConfig
from train.inputs import samples_a_step
from train.loop import take_steps


def train(config: TrainConfig) -> None:
    """Train a ControlNet as the settings say and save it in `config.output_dir`.

    Raises:
        ConfigError: settings, base model, cache and checkpoint do not go together.
        ShardError: the cache is incomplete or damaged.
        RunError: a step's gradient is not finite, a checkpoint cannot be written, or the device's
            memory is full.
        OSError: the output cannot be written.
        SystemExit: a signal ended the run, with its code; 0 for SIGTERM.
    """
    if config.estimate:
        for part in _memory(config):
            click.echo(part)
        return
    try:
        _train(config)
    except torch.OutOfMemoryError as error:
        lines = [f"out of memory: {str(error).splitlines()[0]}"]
        if int(os.environ.get("RANK", "0")) == 0:
            click.echo(f"{lines[0]} Finding out what would help …", err=True)
            with contextlib.suppress(Exception):  # whatever it is, the memory is what matters
                lines += _memory(config)
        raise RunError("\n".join(lines)) from error


def _memory(config: TrainConfig) -> Iterator[str]:
    """Give what the run takes, then what would make it less, which takes a while."""
    # A second to import, seldom needed.
    from train.memory.estimate import advice, find_sizes, report
    from train.memory.simulation import simulate

    sizes = find_sizes(config)
    found = simulate(config, sizes)
    yield report(config, sizes, found)
    yield advice(config, sizes, found)


def _train(config: TrainConfig) -> None:
    run = assemble(config)
    accelerator = run.accelerator
    _announce(run)
    data = accelerator.unwrap_model(run.controlnet).config[DATA_KEY]
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_run(config.output_dir, "train", config, num_steps=run.num_steps, data=data)
    if accelerator.log_with:
        flat = {key: value if value is not None else "" for key, value in as_dict(config).items()}
        accelerator.init_trackers(config.tracker_project_name, config=flat)
    if config.push_to_hub and accelerator.is_main_process:
        publish.create_repository(config)

    try:
        state, signal = take_steps(run)
    finally:
        if run.fused is not None:
            run.fused.close()

    accelerator.wait_for_everyone()
    if signal and state.step < run.num_steps:
        command = "the same command"
        if config.resume_from_checkpoint != "latest":
            command += " with --resume-from-checkpoint latest"
        if accelerator.is_main_process:
            click.echo(
                f"{config.output_dir}: {signal.name} after step {state.step}; {command} goes on"
            )
        accelerator.end_training()
        sys.exit(0 if signal == SIGTERM else 128 + signal)
    checkpoints.save_result(accelerator, run.controlnet, run.average, config.output_dir)
    if accelerator.is_main_process:
        publish.write_card(run)
        click.echo(f"{config.output_dir}: ControlNet saved after {state.step} steps")
        if config.push_to_hub:
            click.echo(publish.push(config))
    accelerator.end_training()


def _announce(run: Run) -> None:
    """Say what is about to be trained, and from where."""
    if not run.accelerator.is_main_process:
        return
    inputs, order = run.inputs, run.inputs.order
    start = f"resuming {inputs.checkpoint}" if inputs.checkpoint else "starting anew"
    buckets = ""
    if order.several_buckets:
        shapes = {order.buckets[shard] for shard in order.shards}
        buckets = f" in {len(shapes)} buckets, filled up to {order.start(1)} an epoch"
    step_samples = samples_a_step(run.config, run.accelerator.num_processes)
    click.echo(
        f"train: {order.num_records} samples{buckets}, {run.num_steps} steps of {step_samples}, "
        f"{run.num_trained / 1e6:.1f} M parameters to train, {start}"
    )
    if run.config.validation_steps > 0 and not (inputs.draws or inputs.measures):
        click.echo(
            "train: the cache has neither validation pairs nor held-out rows, so nothing will be "
            "validated"
        )
