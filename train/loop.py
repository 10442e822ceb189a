"""The loop of stage 2: optimiser steps, and what is due between them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from signal import Signals

import torch
from tqdm import tqdm

from common.interruption import Received
from common.progress import Progress
from train.assembly import Run
from train.config import DROPPED
from train.dashboard.dashboard import Dashboard, open_dashboard
from train.data import Batch, Dropout, RankPlaces, TrainingSamples, read_batches
from train.inputs import samples_per_step
from train.loss import batch_losses, noise_levels
from train.optim.averaged_weights import averaged
from train.optim.nonfinite import NonFiniteGuard
from train.processes.agreement import HostGroup
from train.processes.sharding import clip_gradients
from train.processes.strategy import keeps_gradients, strategy
from train.saving import checkpoints
from train.saving.best import keep_best
from train.saving.checkpoints import TrainState
from train.step_log import StepLog
from train.validation import pictures
from train.watch.curves import NUM_LEVELS


def take_steps(run: Run, received: Received) -> tuple[TrainState, Signals | None]:
    """Take optimiser steps until all are done or a signal comes.

    Args:
        run: what takes them.
        received: returns the signal that this process has received, or None.

    Returns:
        Where the run then stands, and the signal that ended it early, or None.

    Raises:
        RunError: a step's gradient is not finite, or a checkpoint cannot be written.
        ShardError: a record is missing or damaged.
    """
    config, accelerator, state = run.config, run.accelerator, run.inputs.state
    samples = TrainingSamples(
        [one.cache for one in run.inputs.sets],
        run.inputs.order,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
        strata=samples_per_step(config, accelerator.num_processes)
        if config.stratified_timesteps
        else 1,
        dropout=Dropout(*(getattr(config, f"dropout_{name}") for name in DROPPED)),
    )
    batch_places = RankPlaces(
        state.place,
        batch_size=config.train_batch_size,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    batches = read_batches(
        samples,
        batch_places,
        num_workers=config.dataloader_num_workers,
        pin=accelerator.device.type == "cuda",
    )
    guard = NonFiniteGuard(
        run.optimizer.optimizer,
        scales_loss=accelerator.mixed_precision == "fp16",
        update_already_applied=strategy(accelerator) == "deepspeed",
        updates_per_weight=run.fused is not None,
        stop=config.on_nonfinite == "stop",
        sample_key=samples.key,
        sample_set=lambda place: run.inputs.order.locate(place)[0],
        num_sets=len(run.inputs.sets),
        print=tqdm.write,
    )
    dashboard = open_dashboard(run)
    if pictures.is_due(run, state.step):
        # The run is new; or it was killed after that step's checkpoint, and what follows it may be
        # missing.
        with averaged(run.optimizer.optimizer):
            if state.step and pictures.is_done(run, state.step):
                _use(run, state.step, pictures.read_losses(run, state.step), dashboard)
            else:
                _use(run, state.step, pictures.validate(run, state.step), dashboard)
    hosts = HostGroup()
    with _progress(run) as progress:
        log = StepLog(run, guard, hosts, progress, dashboard)
        state, signal = _loop(run, batches, log, lambda: hosts.agreed_signal(received()))
    batches.close()
    if guard.num_skipped:
        run.print(f"{guard.num_skipped} steps were left out, since their gradient was not finite")
    return state, signal


def _progress(run: Run) -> Progress:
    return Progress(
        run.num_steps,
        "step",
        "train",
        initial=min(run.inputs.state.step, run.num_steps),
        quiet=not run.accelerator.is_main_process,
        rate_unit="samples",
        rate_factor=samples_per_step(run.config, run.accelerator.num_processes),
        with_values=True,
    )


def _loop(
    run: Run,
    batches: Iterator[tuple[list[int], Batch]],
    log: StepLog,
    agreed_signal: Received,
) -> tuple[TrainState, Signals | None]:
    """Take the steps; log, save and validate between them."""
    config, state = run.config, run.inputs.state
    step_samples = samples_per_step(config, run.accelerator.num_processes)
    signal = None
    while state.step < run.num_steps and not signal:
        norm = take_step(run, batches, log.guard, state.step + 1)
        log.write()  # of the step before, which has been examined meanwhile
        state = replace(state, step=state.step + 1, place=state.place + step_samples)
        log.progress.update()
        signal = agreed_signal()
        last = state.step == run.num_steps or bool(signal)
        if state.step % config.logging_steps == 0 or last:
            log.note(state, norm)
        if state.step % config.checkpointing_steps == 0 or last:
            with log.paused(), averaged(run.optimizer.optimizer):
                checkpoints.save(run.accelerator, config, state, run.ema)
        if pictures.is_due(run, state.step) and not signal:
            with log.paused(), averaged(run.optimizer.optimizer):
                _use(run, state.step, pictures.validate(run, state.step), log.dashboard)
    if log.dashboard is not None:
        log.dashboard.write(state.step)
    return state, signal


def _use(
    run: Run, step: int, losses: Mapping[str, Sequence[float]], dashboard: Dashboard | None
) -> None:
    """Do what follows a validation: keep the best ControlNet, and write the page."""
    keep_best(run, step, losses)
    if dashboard is not None:
        dashboard.write(step)


def take_step(
    run: Run, batches: Iterator[tuple[list[int], Batch]], guard: NonFiniteGuard, step: int
) -> torch.Tensor | None:
    """Take one optimiser step.

    Args:
        run: what takes the step.
        batches: of this process, with the places of their samples.
        guard: skips the update if a gradient is not finite.
        step: its number.

    Returns:
        The gradient's norm before it was clipped, []; None where it is never whole.

    Raises:
        RunError: the gradient of the step before was not finite, and the run is to stop then.
        ShardError: a record is missing or damaged.
    """
    config, accelerator = run.config, run.accelerator
    losses: list[torch.Tensor] = []
    levels: list[torch.Tensor] = []
    step_places: list[int] = []
    nonfinite = torch.zeros((), device=accelerator.device)
    norm: torch.Tensor | None = None
    for places, batch in itertools.islice(batches, config.gradient_accumulation_steps):
        with accelerator.accumulate(run.controlnet):
            with run.activation_offload:
                sample_losses, of_levels = _losses(run, batch)
            accelerator.backward(sample_losses.mean())
            if accelerator.sync_gradients:
                if run.fused is not None:
                    nonfinite = run.fused.pop_nonfinite()
                else:
                    norm = clip_gradients(
                        accelerator, run.controlnet, run.optimizer.optimizer, config.max_grad_norm
                    )
                    nonfinite = guard.before_update(norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=not keeps_gradients(accelerator))
        losses.append(sample_losses.detach())
        levels.append(of_levels)
        step_places += places
    if not guard.is_left_out(nonfinite):
        run.schedule.step()
        if run.ema is not None:
            run.ema.step()
    guard.after_update(step, step_places, torch.cat(losses), torch.cat(levels), nonfinite)
    return norm


def _losses(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each sample and the part of the noise levels that it is of, [B] each."""
    there = batch.to(run.accelerator.device)
    drawn = noise_levels(there, run.objective)
    levels = (drawn[0] * NUM_LEVELS).long().clamp(max=NUM_LEVELS - 1)
    losses = batch_losses(there, run.controlnet, run.transformer, run.objective, drawn)
    return losses, levels
