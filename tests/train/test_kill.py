"""Stage 2 killed or interrupted at any moment ends in the same weights, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from train.config import TrainConfig
from train.saving import checkpoints

NUM_KILLS, NUM_TERMS = 20, 5
NUM_STEPS = 12
RESULTS = ("diffusion_pytorch_model.safetensors", "controlnet_ema", "validation")


def run_alone(config: TrainConfig) -> None:
    import torch

    from train.run import train

    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    train(config)


def results(folder: Path) -> dict[str, bytes]:
    """Return what a run is for: weights, their average, pictures and held-out losses."""
    files = [path for name in RESULTS for path in [folder / name, *folder.glob(f"{name}/**/*")]]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in files if path.is_file()
    }


class Runs:
    """Runs of the same settings, each in a process of its own."""

    def __init__(self, config: TrainConfig) -> None:
        # Forked from a process that has imported everything and run nothing.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train.run"])
        self.config = config

    def start(self, output_dir: Path) -> multiprocessing.process.BaseProcess:
        """Start, or go on; return when training is about to begin."""
        config = replace(self.config, output_dir=output_dir)
        process = self.context.Process(target=run_alone, args=(config,))
        (output_dir / "run.json").unlink(missing_ok=True)
        process.start()
        while not (output_dir / "run.json").exists() and process.is_alive():
            time.sleep(0.001)
        return process

    def finish(self, output_dir: Path) -> float:
        """Run to the end; return how long the steps took, in seconds."""
        process = self.start(output_dir)
        begun = time.monotonic()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - begun


@pytest.fixture
def runs(train_config: TrainConfig, held_out: Path) -> Runs:
    """Checkpoints at every other step, pictures and a held-out loss at every fourth."""
    return Runs(
        replace(
            train_config,
            cache=(str(held_out),),
            max_train_steps=NUM_STEPS,
            checkpointing_steps=2,
            checkpoints_total_limit=2,
            validation_steps=4,
            num_validation_images=1,
            validation_inference_steps=2,
            ema_decay=0.9,
            proportion_empty_prompts=0.3,
            dataloader_num_workers=1,
            resume_from_checkpoint="latest",
        )
    )


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_in_the_same_bits(runs: Runs, tmp_path: Path) -> None:
    duration = runs.finish(tmp_path / "whole")
    expected = results(tmp_path / "whole")
    # Three validations have two pictures with the weights, two with their average, and losses; the
    # one before training has no average.
    assert len(expected) == 1 + 2 + 3 * (2 * 2 + 1) + (2 + 1)
    rng, killed, in_a_checkpoint, out = random.Random(0), 0, 0, tmp_path / "killed"
    while killed < NUM_KILLS or not in_a_checkpoint:
        process = runs.start(out)
        process.join(rng.uniform(0, duration))
        if process.is_alive():
            process.kill()
            killed += 1
            in_a_checkpoint += bool(list(out.glob("checkpoint-*.partial")))
        process.join()
        if process.exitcode == 0:
            assert results(out) == expected
            shutil.rmtree(out)
        else:
            assert process.exitcode == -signal.SIGKILL
    runs.finish(out)
    assert results(out) == expected
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}


@pytest.mark.slow
def test_runs_ended_by_sigterm_leave_a_checkpoint_of_their_last_step(
    runs: Runs, tmp_path: Path
) -> None:
    duration = runs.finish(tmp_path / "whole")
    rng, out = random.Random(1), tmp_path / "ended"
    ended: list[int] = []
    while len(ended) < NUM_TERMS:
        process = runs.start(out)
        process.join(rng.uniform(0.1, duration / 3))
        running = process.is_alive()
        process.terminate()
        process.join()
        assert process.exitcode in (0, -signal.SIGTERM)
        if running and process.exitcode == 0:
            ended.append(checkpoints.read_state(checkpoints.find(out)[-1]).step)
        if (out / "config.json").exists():
            shutil.rmtree(out)
    assert any(step % 2 for step in ended), ended
    runs.finish(out)
    assert results(out) == results(tmp_path / "whole")
