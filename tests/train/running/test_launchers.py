"""Signals to a launcher end a run with a checkpoint, also where its processes receive them too.

`test_slurm.py` sends SIGTERM to a launcher and its processes together.
"""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, flags, free_port
from tests.train.running.slurm import WAIT_S, until
from train.config import TrainConfig
from train.run import train
from train.saving import checkpoints

pytestmark = pytest.mark.slow


def accelerate_launch() -> list[str]:
    options = {
        "config_file": REPOSITORY / "configs" / "accelerate" / "ddp.yaml",
        "num_processes": 2,
        "main_process_port": free_port(),
    }
    launch = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    return ["accelerate.commands.launch", *launch, "-m", "tests.sharded_on_cpu", "train"]


def torchrun() -> list[str]:
    options = ["--nproc-per-node", "2", "--master-port", str(free_port())]
    return ["torch.distributed.run", *options, "-m", "train"]


@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        (accelerate_launch, signal.SIGTERM, False),
        (torchrun, signal.SIGINT, True),
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_the_run_ends_with_a_checkpoint_and_goes_on(
    train_config: TrainConfig,
    tmp_path: Path,
    launcher: object,
    number: signal.Signals,
    to_all: bool,
) -> None:
    assert callable(launcher)
    config = replace(
        train_config,
        train_batch_size=1,
        lr_scheduler="constant",
        max_train_steps=100_000,
        checkpointing_steps=100_000,
        logging_steps=1,
        mixed_precision="bf16",
        resume_from_checkpoint="latest",
    )
    output = tmp_path / "output"
    with (
        output.open("w") as written,
        subprocess.Popen(
            [sys.executable, "-m", *launcher(), *flags(config)],
            cwd=REPOSITORY,
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=written,
            text=True,
        ) as process,
    ):
        until(lambda: "train: 1 of 100000 steps" in output.read_text(), process, output)
        told = [psutil.Process(process.pid)]
        if to_all:
            told += told[0].children(recursive=True)
        for one in told:
            one.send_signal(number)
        assert process.wait(WAIT_S) != 0
    (checkpoint,) = checkpoints.find(config.output_dir)
    assert not list(config.output_dir.glob("*.partial"))
    step = checkpoints.read_state(checkpoint).step
    line = f"{number.name} after step {step}; the same command goes on"
    assert line in output.read_text()
    more = replace(config, train_batch_size=2, max_train_steps=step + 1)
    train(more)
    state = checkpoints.read_state(checkpoints.find(config.output_dir)[-1])
    assert (state.step, state.place) == (step + 1, 2 * (step + 1))
