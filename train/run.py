"""Stage 2 from start to end: load the networks, take the steps, save the ControlNet."""

import contextlib
import os
from collections.abc import Iterator
from signal import Signals

import click

from common.errors import RunError, ShardError, os_error_line
from common.interruption import signals_noted
from common.memory.exhausted import first_line, is_out_of_memory
from common.provenance import write_run
from sd3.base.lora import say_text_is_cached
from sd3.controlnet.block_counts import describe_count
from sd3.pretrained import DATA_KEY
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles
from train.assembly import Run, assemble
from train.config import TrainConfig
from train.evaluation.evaluate import evaluate
from train.inputs import samples_per_step
from train.loop import take_steps
from train.optim.averaged_weights import averaged
from train.optim.learning_rate import ends_in_warm_up, remarks
from train.processes.agreement import main_decides
from train.processes.group import group_closed_at_the_end
from train.saving import publish
from train.saving.checkpoints import PREFIX, TrainState
from train.saving.controlnet import (
    CONTROLNET_FOLDER,
    EMA_FOLDER,
    is_same_controlnet,
    save_result,
)
from train.saving.model_card import CARD, write_card
from train.sets.description import describe_mix
from train.validation import pictures
from train.watch.trackers import start_trackers


def train(config: TrainConfig) -> Signals | None:
    """Train a ControlNet and save it in `config.output_dir`.

    Or only estimate the memory that it takes, or evaluate one.

    Returns:
        The signal that ended the run before its last step, or None.

    Raises:
        ConfigError: settings, base model, cache and checkpoint do not go together.
        ShardError: the cache is incomplete or damaged.
        RunError: a step's gradient is not finite, a checkpoint cannot be written, or the device's
            memory is full.
        OSError: the output cannot be written.
    """
    if config.estimate:
        for text in _memory_report(config) if _is_first_process() else ():
            click.echo(text)
        return None
    try:
        with group_closed_at_the_end():
            if config.evaluate is None:
                return _train(config)
            evaluate(config)
            return None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lines = [f"out of memory: {first_line(error)}"]
        if _is_first_process():
            click.echo(f"{lines[0]} Finding out what would help …", err=True)
            with contextlib.suppress(Exception):  # the lack of memory is what to report
                lines += _memory_report(config)
        raise RunError("\n".join(lines)) from error


def _is_first_process() -> bool:
    """Return whether this process is the first of a launcher's, or alone."""
    return int(os.environ.get("RANK", "0")) == 0


def _memory_report(config: TrainConfig) -> Iterator[str]:
    """Yield the memory that the run takes, then options that reduce it, which take a while."""
    # Takes a second to import, and is seldom needed.
    from train.memory.estimate import advice, find_sizes, report
    from train.memory.simulation import simulate

    sizes = find_sizes(config)
    estimate = simulate(config, sizes)
    yield report(config, sizes, estimate)
    yield advice(config, sizes, estimate)


def _train(config: TrainConfig) -> Signals | None:
    with contextlib.closing(assemble(config)) as run:
        try:
            if _is_finished(run):
                _say_that_nothing_is_to_do(run)
                return None
            return _take_steps_and_save(run)
        except ShardError as error:
            changed = [one.location for one in run.inputs.sets if _is_cache_changed(one.cache)]
            if not changed:
                raise
            raise ShardError(
                f"{changed[0]}: the cache was changed while the run read it ({error}). Run "
                f"precompute again with the settings of before; then {_command(config)} goes on. "
                "Or train on the changed cache, in another --output-dir."
            ) from error


def _is_cache_changed(cache: Cache) -> bool:
    """Return whether a cache of this machine is another than the one that the run opened."""
    if not isinstance(cache.files, LocalFiles):
        return False
    try:
        now = cache.files.manifest()
    except ShardError:
        return True  # precompute is at work on it
    return dict(now.products()) != dict(cache.manifest.products())


def _take_steps_and_save(run: Run) -> Signals | None:
    """Train; return the signal that ended the run before its last step, or None."""
    config = run.config
    _announce(run)
    _start_records(run)
    repository = None
    if config.push_to_hub:
        repository = main_decides(lambda: publish.create_repository(config))
    with signals_noted("step") as received:
        state, signal = take_steps(run, received)
        run.accelerator.wait_for_everyone()
        ended_early = signal if state.step < run.num_steps else None
        if ended_early:
            _say_how_to_resume(run, state, ended_early)
        else:
            _save(run, state, repository)
    if repository and not ended_early and run.accelerator.is_main_process:
        click.echo(publish.push(config, repository))
    run.accelerator.end_training()
    return ended_early


def _is_finished(run: Run) -> bool:
    """Return whether the checkpoint is the run's last, and all that follows it is done.

    Every process must call this.
    """
    checkpoint, step = run.inputs.checkpoint, run.inputs.state.step
    if checkpoint is None or step < run.num_steps or run.config.push_to_hub:
        return False
    folder, names = run.config.output_dir, {CONTROLNET_FOLDER: "."}
    if run.ema is not None:
        names[EMA_FOLDER] = EMA_FOLDER
    return main_decides(
        lambda: (
            (folder / CARD).is_file()
            and (not pictures.is_due(run, step) or pictures.is_done(run, step))
            and all(is_same_controlnet(checkpoint / one, folder / names[one]) for one in names)
        )
    )


def _say_that_nothing_is_to_do(run: Run) -> None:
    if run.accelerator.is_main_process:
        click.echo(
            f"{run.config.output_dir}: nothing to do: the ControlNet is saved after "
            f"{run.inputs.state.step} steps, and the run ends at step {run.num_steps}; "
            "--max-train-steps or --num-train-epochs makes it longer"
        )


def _save(run: Run, state: TrainState, repository: str | None) -> None:
    """Save the ControlNet with its card; `repository` is where it will be uploaded to."""
    folder = run.config.output_dir
    try:
        with averaged(run.optimizer.optimizer):
            save_result(run.accelerator, run.controlnet, run.ema, folder)
        main_decides(lambda: write_card(run, repository))
    except OSError as error:
        resumed = run.inputs.checkpoint if state.step == run.inputs.state.step else None
        raise RunError(
            f"{folder}: the ControlNet could not be written ({os_error_line(error)}); "
            f"{resumed.name if resumed else f'{PREFIX}{state.step}'} holds it. Make room; then "
            f"{_command(run.config)} finishes."
        ) from error
    if run.accelerator.is_main_process:
        remark = ""
        if ends_in_warm_up(run.config, state.step):
            remark = (
                f", all in the warm-up of {run.config.lr_warmup_steps}: it has hardly been trained"
            )
        click.echo(f"{folder}: ControlNet saved after {state.step} steps{remark}")


def _start_records(run: Run) -> None:
    """Write run.json and start the tracker."""
    config, accelerator = run.config, run.accelerator
    data = accelerator.unwrap_model(run.controlnet).config[DATA_KEY]
    if accelerator.is_main_process:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        write_run(config.output_dir, "train", config, num_steps=run.num_steps, data=data)
    start_trackers(accelerator, config)


def _command(config: TrainConfig) -> str:
    """Return what to type so that a run goes on from its last checkpoint."""
    resumes = config.resume_from_checkpoint == "latest"
    return "the same command" + ("" if resumes else " with --resume-from-checkpoint latest")


def _say_how_to_resume(run: Run, state: TrainState, signal: Signals) -> None:
    if run.accelerator.is_main_process:
        after = f"{signal.name} after step {state.step}"
        click.echo(f"{run.config.output_dir}: {after}; {_command(run.config)} goes on")


def _announce(run: Run) -> None:
    """Print what is about to be trained, and from where it starts."""
    if not run.accelerator.is_main_process:
        return
    inputs, order = run.inputs, run.inputs.order
    start = f"resuming {inputs.checkpoint}" if inputs.checkpoint else "starting anew"
    buckets = ""
    if len(inputs.sets) == 1 and order.orders[0].several_buckets:
        shapes = {order.orders[0].buckets[shard] for shard in order.orders[0].shards}
        buckets = f" in {len(shapes)} buckets, filled up to {order.start(1)} an epoch"
    step_samples = samples_per_step(run.config, run.accelerator.num_processes)
    click.echo(
        f"train: {order.num_records} samples{buckets}, {run.num_steps} steps of {step_samples}, "
        f"{run.num_trained / 1e6:.1f} M parameters to train, {start}"
    )
    for location, weight in zip(run.config.cache, run.config.weights, strict=False):
        if weight == 0:
            click.echo(f"train: {location}: left out, since its weight is 0")
    for line in describe_mix(inputs.sets, order):
        click.echo(f"train: {line}")
    num_blocks = run.accelerator.unwrap_model(run.controlnet).config.num_layers
    if remark := describe_count(num_blocks, run.transformer.config.num_layers):
        click.echo(f"train: {remark}")
    for one in inputs.sets:
        say_text_is_cached(inputs.loras, one.cache.manifest.made_by.get("loras", []))
    for remark in remarks(run.config, run.num_steps):
        click.echo(f"train: {remark}")
    if run.config.validation_steps > 0 and not inputs.validates:
        click.echo(
            "train: the cache has neither validation pairs nor held-out rows, so nothing will be "
            "validated"
        )
