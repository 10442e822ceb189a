"""What DDP holds and sends: the buckets of its gradients, and nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from tests.train.memory.steps import batches_and_guard
from train import assembly, distribution, loop
from train.assembly import Run, assemble
from train.config import TrainConfig
from train.memory import simulation
from train.memory.estimate import find_sizes
from train.memory.simulation import simulate


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DDP over a group that this process is alone in, though accelerate counts two."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    prepare = distribution.prepare

    def prepared(accelerator: Any, *others: Any) -> Any:
        monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
        monkeypatch.setitem(
            PartialState._shared_state, "distributed_type", DistributedType.MULTI_CPU
        )
        accelerator.state.distributed_type = DistributedType.MULTI_CPU
        accelerator.state.num_processes = 2
        return prepare(accelerator, *others)

    monkeypatch.setattr(assembly.distribution, "prepare", prepared)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    yield
    torch.distributed.destroy_process_group()


def taken(config: TrainConfig, num_steps: int) -> tuple[Run, list[int]]:
    """Return a run, and the most bytes that each step takes beside what is there before it."""
    # From the start, for the profiler does not see memory freed that it has not seen allocated.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run = assemble(config)
        batches, guard = batches_and_guard(run)
        for step in range(1, num_steps + 1):
            with record_function(f"step {step}"):
                loop.take_step(run, batches, guard, step)
        batches.close()
    events: Any = recorded.profiler
    steps, most = 0, [0] * num_steps
    now = before = 0
    for event in sorted(events.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("step "):
            steps, before = steps + 1, now
        elif event.name() == "[memory]":
            now += event.nbytes()
            if steps:
                most[steps - 1] = max(most[steps - 1], now - before)
    return run, most


@pytest.mark.slow
@pytest.mark.usefixtures("one_of_two")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_held_once_and_buffers_are_not_sent(
    accumulation: int,
    config: TrainConfig,
) -> None:
    config = replace(config, gradient_accumulation_steps=accumulation)
    run, (_, second, third) = taken(config, 3)
    assert isinstance(run.controlnet, DistributedDataParallel)
    assert not run.controlnet.will_sync_module_buffers()
    step = simulate(config, find_sizes(config)).step
    gradients = 4 * run.num_trained
    # All buckets are there when a step begins.
    assert step["gradients"] + step["activations"] - gradients == pytest.approx(third, rel=0.01)
    assert second == pytest.approx(max(third, gradients if accumulation > 1 else 0), rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("one_of_two")
def test_buckets_that_are_ordered_anew_are_counted(config: TrainConfig) -> None:
    """Where activations take less than gradients, that is when the most is taken."""
    config = replace(
        config,
        gradient_accumulation_steps=2,
        checkpointing="full",
        train_batch_size=1,
        num_controlnet_layers=3,
    )
    run, (_, second, third) = taken(config, 3)
    step = simulate(config, find_sizes(config)).step
    gradients = 4 * run.num_trained
    # A batch lies beside them.
    assert third < second == pytest.approx(gradients, rel=0.04)
    assert step["gradients"] == 2 * gradients


@pytest.mark.slow
def test_validation_beside_buckets(
    config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = replace(find_sizes(config), validates=True)
    alone = simulate(config, sizes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    several = simulate(config, sizes)
    gradients = alone.step["optimiser"] // 2
    assert several.validation == alone.validation + gradients
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "true")
            assert not simulation.uses_ddp()
