"""Several processes: the same losses as one, and the same order whatever their number."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.reference.runs import logged_losses
from tests.conftest import (
    REPOSITORY,
    flags,
    free_port,
    run_python,
    running,
    train_in_two_processes,
    two_processes,
)
from tests.train.test_run import assert_close, near_gradient_descent
from train.config import TrainConfig
from train.run import train
from train.saving import checkpoints

pytestmark = pytest.mark.slow
DEEPSPEED = [pytest.param(name, marks=pytest.mark.extras) for name in ("zero2", "zero3")]


@pytest.fixture
def config(train_config: TrainConfig) -> TrainConfig:
    """Six steps of two samples, all losses logged."""
    return replace(
        near_gradient_descent(train_config),
        lr_scheduler="constant",
        max_train_steps=6,
        logging_steps=1,
        report_to="tensorboard",
    )


def launch(
    name: str, config: TrainConfig, num_processes: int = 2, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Train on CPUs as one of configs/accelerate/ says."""
    options = {
        "config_file": REPOSITORY / "configs" / "accelerate" / f"{name}.yaml",
        "num_processes": num_processes,
        "main_process_port": free_port(),
    }
    launch = [part for key, value in options.items() for part in (f"--{key}", value)]
    return run_python(
        *("-m", "accelerate.commands.launch", *launch, "-m", "tests.sharded_on_cpu", "train"),
        *flags(config),
        DS_ACCELERATOR="cpu",
        **environment,
    )


def train_sharded(
    name: str, config: TrainConfig, num_processes: int = 2, **environment: str
) -> None:
    done = launch(name, config, num_processes, **environment)
    assert done.returncode == 0, done.stderr


def test_losses_are_those_of_one_process(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    two = replace(config, output_dir=tmp_path / "two", train_batch_size=1)
    train_in_two_processes(two)
    one, other = logged_losses(config.output_dir), logged_losses(two.output_dir)
    assert len(one) == 6
    assert one == pytest.approx(other, rel=1e-5)


def test_two_then_one_then_two_processes_take_the_same_samples(
    config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    mixed = replace(config, output_dir=tmp_path / "mixed", resume_from_checkpoint="latest")
    train_in_two_processes(replace(mixed, train_batch_size=1, max_train_steps=2))
    train(replace(mixed, max_train_steps=4))
    train_in_two_processes(replace(mixed, train_batch_size=1))
    assert_close(config.output_dir, mixed.output_dir)
    state = checkpoints.read_state(mixed.output_dir / "checkpoint-6")
    assert (state.step, state.place) == (6, 12)


def test_a_signal_to_one_process_ends_both_after_the_same_step(
    config: TrainConfig, tmp_path: Path
) -> None:
    endless = replace(
        config, train_batch_size=1, max_train_steps=100_000, output_dir=tmp_path / "endless"
    )
    command = two_processes(replace(endless, checkpointing_steps=100_000))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true"}
    pipe = subprocess.PIPE
    with running(command, env=environment, stdout=pipe, stderr=pipe) as process:
        while not list(endless.output_dir.glob("logs/train_controlnet/events*")):
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(3)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        )
        os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    # The launcher calls it a failure that its processes end with 143.
    assert process.returncode == 1
    assert "exitcode  : 143" in errors
    (checkpoint,) = checkpoints.find(endless.output_dir)
    step = checkpoints.read_state(checkpoint).step
    assert 0 < step < 100_000
    line = f"SIGTERM after step {step}; the same command with --resume-from-checkpoint latest"
    assert line in output


@pytest.mark.parametrize("name", ["ddp", "fsdp2", *DEEPSPEED])
def test_sharded_training_is_that_of_one_process(
    name: str, config: TrainConfig, held_out: Path, tmp_path: Path
) -> None:
    """With accumulation, checkpointed activations, a resume, pictures and held-out losses."""
    config = replace(
        config,
        cache=(str(held_out),),
        checkpointing="full" if name.startswith("zero") else "selective",
        validation_steps=3,
        num_validation_images=1,
        validation_inference_steps=2,
        resume_from_checkpoint="latest",
        ema_decay=None if name.startswith("zero") else 0.9,
    )
    train(replace(config, train_batch_size=2, gradient_accumulation_steps=2))
    two = replace(
        config, output_dir=tmp_path / "two", train_batch_size=1, gradient_accumulation_steps=2
    )
    train_sharded(name, replace(two, max_train_steps=4))
    train_sharded(name, two)
    one, other = logged_losses(config.output_dir), logged_losses(two.output_dir)
    assert len(one) == 6
    assert one == pytest.approx(other, rel=1e-5)
    results = ["", "checkpoint-6/controlnet"]
    if config.ema_decay:
        results += ["controlnet_ema", "checkpoint-6/controlnet_ema"]
    for result in results:
        assert_close(config.output_dir / result, two.output_dir / result)
    for step in ("step-000003", "step-000006"):
        ours, theirs = (
            json.loads((folder / "validation" / step / "held_out.json").read_text())
            for folder in (config.output_dir, two.output_dir)
        )
        assert ours.keys() == theirs.keys()
        for kind, levels in ours.items():
            assert levels == pytest.approx(theirs[kind], rel=1e-4)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_compiled_blocks_share_the_work(
    name: str, config: TrainConfig, held_out: Path, tmp_path: Path
) -> None:
    """Validation at the start and the end included, which computes without compiled blocks."""
    config = replace(
        config,
        cache=(str(held_out),),
        max_train_steps=2,
        checkpointing="controlnet",
        validation_steps=2,
        num_validation_images=1,
        validation_inference_steps=1,
    )
    train(config)
    two = replace(config, output_dir=tmp_path / "two", train_batch_size=1, compile=True)
    train_sharded(name, two)
    one, other = logged_losses(config.output_dir), logged_losses(two.output_dir)
    assert len(one) == 2
    assert one == pytest.approx(other, rel=1e-4)
    assert_close(config.output_dir, two.output_dir)


def test_fsdp_goes_on_with_another_number_of_processes(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    mixed = replace(config, output_dir=tmp_path / "mixed", resume_from_checkpoint="latest")
    train_sharded("fsdp2", replace(mixed, train_batch_size=1, max_train_steps=2))
    train_sharded("fsdp2", replace(mixed, max_train_steps=4), num_processes=1)
    train_sharded("fsdp2", replace(mixed, train_batch_size=1))
    assert logged_losses(config.output_dir) == pytest.approx(
        logged_losses(mixed.output_dir), rel=1e-5
    )
    assert_close(config.output_dir, mixed.output_dir)


def test_checkpoints_of_another_strategy_are_refused(config: TrainConfig) -> None:
    train(replace(config, max_train_steps=2))
    more = replace(config, train_batch_size=1, resume_from_checkpoint="latest")
    done = launch("fsdp2", more)
    assert done.returncode != 0
    assert "SIGABRT" not in done.stderr  # as open connections make of a process that ends
    assert "checkpoint-2: written with one process or DDP, and this is FSDP2" in done.stderr
