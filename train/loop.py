"""The loop of stage 2: optimiser steps, and what is due between them."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from signal import Signals

import torch
import torch.distributed
from accelerate import Accelerator
from tqdm import tqdm

from common.interruption import Received
from common.progress import Progress
from train.assembly import Run
from train.data import Batch, RankPlaces, TrainingSamples, read_batches
from train.inputs import samples_per_step
from train.loss import batch_losses
from train.optim.nonfinite import NonFiniteGuard
from train.processes.sharding import clip_gradients
from train.processes.strategy import keeps_gradients, strategy
from train.saving import checkpoints
from train.saving.checkpoints import TrainState
from train.validation import pictures


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
        run.inputs.cache,
        run.inputs.order,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
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
        print=tqdm.write,
    )
    if pictures.is_due(run, state.step) and not (state.step and pictures.is_done(run, state.step)):
        # The run is new; or it was killed between that step's checkpoint and its validation.
        pictures.validate(run, state.step)
    with _progress(run) as progress:
        state, signal = _loop(run, batches, guard, _agreement(accelerator, received), progress)
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
    guard: NonFiniteGuard,
    agreed_signal: Received,
    progress: Progress,
) -> tuple[TrainState, Signals | None]:
    """Take the steps; log, save and validate between them."""
    config, state = run.config, run.inputs.state
    step_samples = samples_per_step(config, run.accelerator.num_processes)
    signal = None
    while state.step < run.num_steps and not signal:
        norm = take_step(run, batches, guard, state.step + 1)
        state = replace(state, step=state.step + 1, place=state.place + step_samples)
        progress.update()
        signal = agreed_signal()
        last = state.step == run.num_steps or bool(signal)
        if state.step % config.logging_steps == 0 or last:
            _log(run, guard, state, norm, progress)
        if state.step % config.checkpointing_steps == 0 or last:
            guard.finish()
            checkpoints.save(run.accelerator, config, state, run.ema)
        if pictures.is_due(run, state.step) and not signal:
            pictures.validate(run, state.step)
    guard.finish()
    return state, signal


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
    step_places: list[int] = []
    nonfinite = torch.zeros((), device=accelerator.device)
    norm: torch.Tensor | None = None
    for places, batch in itertools.islice(batches, config.gradient_accumulation_steps):
        with accelerator.accumulate(run.controlnet):
            with run.activation_offload:
                sample_losses = batch_losses(
                    batch.to(accelerator.device), run.controlnet, run.transformer, run.objective
                )
            accelerator.backward(sample_losses.mean())
            if accelerator.sync_gradients:
                if run.fused is not None:
                    nonfinite = run.fused.pop_nonfinite()
                else:
                    norm = clip_gradients(accelerator, run.controlnet, config.max_grad_norm)
                    nonfinite = guard.before_update(norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=not keeps_gradients(accelerator))
        losses.append(sample_losses.detach())
        step_places += places
    if not guard.is_left_out(nonfinite):
        run.schedule.step()
        if run.ema is not None:
            run.ema.step()
    guard.after_update(step, step_places, torch.cat(losses), nonfinite)
    return norm


def _log(
    run: Run,
    guard: NonFiniteGuard,
    state: TrainState,
    norm: torch.Tensor | None,
    progress: Progress,
) -> None:
    """Log the mean loss since the last call, over all processes, gradient norm and rate.

    Losses that are not finite are left out of the mean; without any other it is NaN.
    """
    sums = guard.pop_loss_sum().to(run.accelerator.device)
    loss_sum, count = run.accelerator.reduce(sums, reduction="sum").tolist()
    loss, lr = loss_sum / count if count else math.nan, run.schedule.get_last_lr()[0]
    epoch = run.inputs.order.epochs(state.place)
    values, shown = {"loss": loss, "lr": lr, "epoch": epoch}, {"loss": f"{loss:.4f}"}
    if norm is not None:
        values["gradient_norm"] = float(norm)
        shown["gradient norm"] = f"{float(norm):.3g}"
    if guard.num_skipped:
        values["steps_left_out"] = guard.num_skipped
    run.accelerator.log(values, step=state.step)
    progress.show(shown | {"lr": f"{lr:.2g}"})


def _agreement(accelerator: Accelerator, received: Received) -> Callable[[], Signals | None]:
    """Return a function that returns the signal that any process has received, or None.

    All processes must call it together: a signal does not reach them in the same step, but they
    must end after the same one.
    """
    if accelerator.num_processes == 1:
        return received
    # On the hosts, so that no process waits for its device.
    group = torch.distributed.new_group(backend="gloo")

    def agreed() -> Signals | None:
        number = torch.tensor(received() or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group)
        return Signals(int(number)) if number else None

    return agreed
