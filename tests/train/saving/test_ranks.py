"""Several processes and one disk: process 0 looks, and all do the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, flags, free_port, run_python
from tests.train.saving.test_damage import cut
from tests.train.test_run import assert_close, near_gradient_descent
from train.config import TrainConfig

pytestmark = pytest.mark.slow
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port")


def test_process_0_decides_and_all_agree(tmp_path: Path) -> None:
    command = (*TORCHRUN, free_port(), "-m", "tests.train.saving.decisions")
    done = run_python(*command, ACCELERATE_USE_CPU="true", DOWNLOADS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    differ = (
        "refused: --cache: process 0 found found by 0, process 1 found by 1. It was changed "
        "meanwhile, or a network disk still shows an older one: run again."
    )
    expected = {
        "decided": ["found by 0"] * 2,
        "failed": ["refused: not here"] * 2,
        "first": ["downloaded", "there"],
        "same": ["None"] * 2,
        "different": [differ] * 2,
    }
    lines = [
        f"{rank} {name} {of_rank}"
        for name, of_both in expected.items()
        for rank, of_rank in enumerate(of_both)
    ]
    assert sorted(done.stdout.splitlines()) == sorted(lines)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("fsdp2", "optimizer_0/__1_0.distcp"),
        pytest.param("zero2", "*zero_pp_rank_1_*", marks=pytest.mark.extras),
    ],
)
def test_a_cut_file_of_one_process_sends_all_to_the_checkpoint_before(
    name: str, state: str, train_config: TrainConfig, tmp_path: Path
) -> None:
    """And process 1 does not even see the newest checkpoint."""
    config = replace(
        near_gradient_descent(train_config),
        train_batch_size=1,
        resume_from_checkpoint="latest",
        lr_scheduler="constant",
        checkpointing_steps=1,
        max_train_steps=3,
    )
    accelerate = (
        *("-m", "accelerate.commands.launch", "--config_file"),
        REPOSITORY / "configs" / "accelerate" / f"{name}.yaml",
        *("--num_processes", 2, "--mixed_precision", "no", "--main_process_port"),
    )
    arguments = ("tests.sharded_on_cpu", "train", *flags(config))
    done = run_python(*accelerate, free_port(), "-m", *arguments, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    whole = Path(shutil.copytree(config.output_dir, tmp_path / "whole"))
    newest = config.output_dir / "checkpoint-3"
    (damaged,) = (path for path in newest.rglob(state) if path.is_file())
    cut(damaged)
    stale = ("tests.train.saving.stale_disk", *arguments)
    done = run_python(*accelerate, free_port(), "-m", *stale, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    assert f"{damaged}: holds " in done.stdout
    assert done.stdout.count("going on from checkpoint-2") == 1
    assert_close(whole, config.output_dir)


@pytest.mark.parametrize("name", ["fsdp2", pytest.param("zero2", marks=pytest.mark.extras)])
def test_a_process_that_cannot_write_ends_all_in_one_line(
    name: str, train_config: TrainConfig
) -> None:
    config = replace(train_config, train_batch_size=1, checkpointing_steps=1, max_train_steps=1)
    done = run_python(
        *("-m", "accelerate.commands.launch", "--config_file"),
        REPOSITORY / "configs" / "accelerate" / f"{name}.yaml",
        *("--num_processes", 2, "--main_process_port", free_port()),
        *("-m", "tests.train.saving.small_disk", "tests.sharded_on_cpu", "train", *flags(config)),
        DS_ACCELERATOR="cpu",
    )
    assert done.returncode != 0
    (line, *_) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    expected = f"Error: {config.output_dir / 'checkpoint-1'} could not be written ("
    assert line.startswith(expected)
    assert "; there is no earlier one. Make room, " in line
    assert not list(config.output_dir.glob("checkpoint-*"))
