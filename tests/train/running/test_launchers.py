"""SIGTERM to a launcher ends its run with a checkpoint; `test_slurm.py` has more of this."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, flags, free_port, running
from tests.train.running.slurm import WAIT_S, until
from train.config import TrainConfig
from train.run import train
from train.saving import checkpoints


@pytest.mark.slow
def test_a_launcher_that_is_told_to_end_leaves_a_checkpoint(
    train_config: TrainConfig, tmp_path: Path
) -> None:
    """The launcher tells its processes; then they are told again, as Slurm tells everybody."""
    options = {
        "config_file": REPOSITORY / "configs" / "accelerate" / "ddp.yaml",
        "num_processes": 2,
        "main_process_port": free_port(),
    }
    launch = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    arguments = ["accelerate.commands.launch", *launch, "-m", "tests.sharded_on_cpu", "train"]
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
        running(
            ["-m", *arguments, *flags(config)],
            env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            stdout=written,
            stderr=written,
        ) as process,
    ):
        until(lambda: "train: 1 of 100000 steps" in output.read_text(), process, output)
        processes = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        until(lambda: output.read_text().count("ending after this step") == 2, process, output)
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.terminate()
        # The launcher's own code and traceback, whatever its processes do.
        assert process.wait(WAIT_S) == 1
    (checkpoint,) = checkpoints.find(config.output_dir)
    assert not list(config.output_dir.glob("*.partial"))
    step = checkpoints.read_state(checkpoint).step
    line = f"SIGTERM after step {step}; the same command goes on"
    assert line in output.read_text()
    more = replace(config, train_batch_size=2, max_train_steps=step + 1)
    train(more)
    state = checkpoints.read_state(checkpoints.find(config.output_dir)[-1])
    assert (state.step, state.place) == (step + 1, 2 * (step + 1))
