"""The loop of stage 2: optimiser steps, and what is due between them."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from signal import Signals
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from tqdm import tqdm

from common.interruption import Received, signals_noted
from train import checkpoints
from train.assembly import Run
from train.checkpoints import TrainState
from train.data import RankBatches, Samples, loader
from train.distribution import clip_gradients, way
from train.inputs import samples_a_step
from train.loss import batch_losses
from train.optim.nonfinite import NonFiniteGuard
from train.validation import pictures


def take_steps(run: Run) -> tuple[TrainState, Signals | None]:
    """Take optimiser steps until all are done or a signal comes.

    Returns:
        Where the run then stands, and the signal that ended it early.

    Raises:
        RunError: a step's gradient is not finite, or a checkpoint cannot be written.
        ShardError: a record is missing or damaged.
    """
    config, accelerator = run.config, run.accelerator
    state = run.inputs.state
    samples = Samples(
        run.inputs.cache,
        run.inputs.order,
        seed=config.seed,
        proportion_empty_prompts=config.proportion_empty_prompts,
    )
    places = RankBatches(
        state.place,
        batch_size=config.train_batch_size,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
    batches = loader(
        samples,
        places,
        num_workers=config.dataloader_num_workers,
        pin=accelerator.device.type == "cuda",
    )
    guard = NonFiniteGuard(
        run.optimizer.optimizer,
        accelerator.scaler,
        too_late=way(accelerator) == "deepspeed",
        in_part=run.fused is not None,
        stop=config.on_nonfinite == "stop",
        name=samples.key,
        say=tqdm.write,
    )
    step_samples = samples_a_step(config, accelerator.num_processes)
    if state.step and pictures.is_due(run, state.step) and not pictures.is_done(run, state.step):
        # Killed between that step's checkpoint and its validation.
        pictures.validate(run, state.step)
    with (
        signals_noted("step") as received,
        tqdm(
            total=run.num_steps,
            initial=min(state.step, run.num_steps),
            desc="train",
            unit="step",
            disable=None if accelerator.is_local_main_process else True,
        ) as bar,
    ):
        agreed = _agreement(accelerator, received)
        signal = None
        while state.step < run.num_steps and not signal:
            _step(run, batches, guard, state.step + 1)
            state = replace(state, step=state.step + 1, place=state.place + step_samples)
            bar.update()
            signal = agreed()
            last = state.step == run.num_steps or bool(signal)
            if state.step % config.logging_steps == 0 or last:
                _log(run, guard, state, bar)
            if state.step % config.checkpointing_steps == 0 or last:
                guard.finish()
                checkpoints.save(
                    accelerator,
                    config.output_dir,
                    replace(state, averaged_steps=run.average.num_steps if run.average else 0),
                    config.checkpoints_total_limit,
                    run.average,
                    config,
                )
            if pictures.is_due(run, state.step) and not signal:
                pictures.validate(run, state.step)
        guard.finish()
    batches.close()
    if guard.num_skipped:
        run.say(f"{guard.num_skipped} steps were left out, since their gradient was not finite")
    return state, signal


def _step(run: Run, batches: Any, guard: NonFiniteGuard, step: int) -> None:
    """Take one optimiser step."""
    config, accelerator = run.config, run.accelerator
    losses, of_places = [], []
    bad = torch.zeros((), device=accelerator.device)
    for places, batch in itertools.islice(batches, config.gradient_accumulation_steps):
        with accelerator.accumulate(run.controlnet):
            with run.saving:
                of_batch = batch_losses(
                    batch.to(accelerator.device), run.controlnet, run.transformer, run.objective
                )
            accelerator.backward(of_batch.mean())
            if accelerator.sync_gradients:
                if run.fused is not None:
                    bad = run.fused.bad()
                else:
                    norm = clip_gradients(accelerator, run.controlnet, config.max_grad_norm)
                    bad = guard.before_update(norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
        losses.append(of_batch.detach())
        of_places += places
    if not accelerator.optimizer_step_was_skipped:
        run.schedule.step()
        if run.average is not None:
            run.average.step()
    guard.after_update(step, of_places, torch.cat(losses), bad)


def _log(run: Run, guard: NonFiniteGuard, state: TrainState, bar: "tqdm[Any]") -> None:
    """Log the mean loss since the last time, over all processes, and the learning rate."""
    sums = guard.sums().to(run.accelerator.device)
    loss_sum, count = run.accelerator.reduce(sums, reduction="sum").tolist()
    loss, lr = loss_sum / max(count, 1), run.schedule.get_last_lr()[0]
    epoch = run.inputs.order.epochs(state.place)
    run.accelerator.log({"loss": loss, "lr": lr, "epoch": epoch}, step=state.step)
    bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2g}")


def _agreement(accelerator: Accelerator, received: Received) -> Callable[[], Signals | None]:
    """Give a function that says which signal any process has received; all must call it together.

    A signal does not reach all processes in the same step, and they must end after the same one.
    """
    if accelerator.num_processes == 1:
        return received
    # On the hosts, so that nobody waits for a device.
    group = torch.distributed.new_group(backend="gloo")

    def agreed() -> Signals | None:
        number = torch.tensor(received() or 0)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group)
        return Signals(int(number)) if number else None

    return agreed
