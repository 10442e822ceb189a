"""What is logged of steps: the values of each under its number, without waiting for the device."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from train import loop, step_log
from train.config import TrainConfig
from train.optim import nonfinite
from train.processes.agreement import HostGroup
from train.run import train
from train.step_log import StepLog

READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__format__,
}


class OnDevice(Tensor):
    """A tensor that the host cannot read, as if it had to wait for that."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in READS, f"{func} waits for the device"
        return super().__torch_function__(func, types, args, kwargs or {})


@dataclass
class Device:
    """What a run had computed, and when it waited.

    Attributes:
        losses: mean of each step.
        norms: of each step's gradient.
        waits: step whose values were waited for, and the last one queued then.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    waits: set[tuple[int, int]] = field(default_factory=set)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Have losses and norms out of the host's reach, but for copies that run meanwhile."""
    found = Device()
    batch_losses, clip_gradients = loop.batch_losses, loop.clip_gradients

    def losses_on_device(*args: Any) -> Tensor:
        losses = batch_losses(*args)
        found.losses.append(float(losses.detach().mean()))
        return losses.as_subclass(OnDevice)

    def norm_on_device(*args: Any) -> Tensor:
        norm = clip_gradients(*args)
        found.norms.append(float(norm))
        return norm.as_subclass(OnDevice)

    class HostCopy:
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            self.step, self.tensors = len(found.norms), tensors

        def wait(self) -> dict[str, Tensor]:
            found.waits.add((self.step, len(found.norms)))
            return {name: tensor.as_subclass(Tensor) for name, tensor in self.tensors.items()}

    monkeypatch.setattr(loop, "batch_losses", losses_on_device)
    monkeypatch.setattr(loop, "clip_gradients", norm_on_device)
    for module in (nonfinite, step_log):
        monkeypatch.setattr(module, "AsyncHostCopy", HostCopy)
    return found


def test_values_come_a_step_late_under_their_own_number(
    train_config: TrainConfig, device: Device
) -> None:
    config = replace(train_config, logging_steps=1, checkpointing_steps=4, report_to="tensorboard")
    train(config)
    # Only before the checkpoint is the step waited for that was just queued.
    assert device.waits == {(1, 2), (2, 3), (3, 4), (4, 4)}
    events = EventAccumulator(str(config.output_dir / "logs" / "train_controlnet")).Reload()
    for name, values in (("loss", device.losses), ("gradient_norm", device.norms)):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3, 4]
        assert [event.value for event in logged] == pytest.approx(values)
    assert [event.step for event in events.Scalars("samples_per_second")] == [2, 3, 4]


def test_the_rate_is_that_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(step_log.time, "monotonic", lambda: now[0])
    logged: list[tuple[int, Mapping[str, float]]] = []
    shown: list[float | None] = []
    run: Any = SimpleNamespace(
        inputs=SimpleNamespace(
            order=SimpleNamespace(epochs=lambda place: place / 100),
            sets=[SimpleNamespace(name="edges"), SimpleNamespace(name="discs")],
        ),
        schedule=SimpleNamespace(get_last_lr=lambda: [0.5]),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), log=lambda values, step: logged.append((step, values))
        ),
    )
    guard: Any = SimpleNamespace(
        finish=lambda: None,
        num_skipped=0,
        pop_loss_sum=lambda: [6.0, 4.0],
        pop_level_sums=lambda: [2.0, 0, 0, 0, 0, 0, 0, 4.0, 1, 0, 0, 0, 0, 0, 0, 3],
        pop_set_sums=lambda: [1.0, 5.0, 2, 2],
    )
    progress: Any = SimpleNamespace(show=lambda _, rate: shown.append(rate))
    log = StepLog(run, guard, HostGroup(), progress)
    for step in (10, 20, 30):
        now[0] += 4
        state: Any = SimpleNamespace(step=step, place=8 * step)
        log.note(state, torch.tensor(2.0))
        if step == 20:
            with log.paused():
                now[0] += 1000
        now[0] += 1  # the next step is queued
        log.write()
    # Of ten steps of eight samples in five seconds.
    assert shown == [None, 16.0, 16.0]
    common = {"loss": 1.5, "lr": 0.5, "gradient_norm": 2.0}
    common |= {"loss/level-0": 2.0, "loss/level-7": 4 / 3}  # no sample was of the others
    common |= {"loss/edges": 0.5, "loss/discs": 2.5}
    assert logged == [
        (10, common | {"epoch": 0.8}),
        (20, common | {"epoch": 1.6, "samples_per_second": 16.0}),
        (30, common | {"epoch": 2.4, "samples_per_second": 16.0}),
    ]
