"""Optimiser's state that belongs into host memory is never on the device, not even on resuming."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from train.assembly import assemble
from train.config import TrainConfig
from train.run import train
from train.saving.resuming import restore


def test_several_processes_read_offloaded_state_into_host_memory(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(train_config, offload_optimizer=True, max_train_steps=2)
    train(config)
    checkpoint = config.output_dir / "checkpoint-2"
    run = assemble(replace(config, output_dir=tmp_path / "resumed"))
    # As one of two processes with GPUs. Whatever is read into this device loses its numbers.
    as_of_two = {
        "device": torch.device("meta"),
        "num_processes": 2,
        "distributed_type": DistributedType.MULTI_GPU,
    }
    for name, value in as_of_two.items():
        monkeypatch.setitem(PartialState._shared_state, name, value)
        monkeypatch.setattr(run.accelerator.state, name, value)
    restore(run.accelerator, checkpoint, optimizer_on_host=config.offload_optimizer)
    saved = torch.load(checkpoint / "optimizer.bin")["state"]
    (group,) = run.optimizer.optimizer.param_groups
    for number, parameter in enumerate(group["params"]):
        for name, tensor in run.optimizer.optimizer.state[parameter].items():
            assert torch.equal(tensor, saved[number][name])
