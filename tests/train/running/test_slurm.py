"""The batch scripts of the docs, run with a stand-in for Slurm up to the time limit and on."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from precompute.config import PrecomputeConfig
from shards.format.manifest import MANIFEST
from tests.conftest import REPOSITORY, free_port
from tests.train.running.slurm import WAIT_S, Slurm, batch_script, until
from train.config import TrainConfig
from train.saving import checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture
def slurm_with(tmp_path: Path) -> Iterator[Callable[[str], Slurm]]:
    """Make a stand-in for a script; what it started and still runs at the end is killed."""
    made: list[Slurm] = []

    def make(script: str) -> Slurm:
        made.append(Slurm(tmp_path, script))
        return made[-1]

    yield make
    for slurm in made:
        slurm.kill()


def toml(section: str, settings: Mapping[str, object]) -> str:
    def value(given: object) -> str:
        if isinstance(given, bool):
            return str(given).lower()
        return str(given) if isinstance(given, int | float) else f'"{given}"'

    lines = [f"{key} = {value(given)}" for key, given in settings.items()]
    return "\n".join([f"[{section}]", *lines]) + "\n"


def changed(script: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


def test_training_is_requeued_at_the_time_limit_and_goes_on_to_the_end(
    train_config: TrainConfig, cache: Path, tmp_path: Path, slurm_with: Callable[[str], Slurm]
) -> None:
    # DDP on CPUs, where FSDP2 on GPUs stands.
    script = changed(
        batch_script("many-gpus.md"),
        ("fsdp2.yaml", "ddp.yaml"),
        ("-m train", "-m tests.sharded_on_cpu train"),
        ("29500", str(free_port())),
    )
    slurm = slurm_with(script)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/accelerate").symlink_to(REPOSITORY / "configs" / "accelerate")
    (tmp_path / "cache").symlink_to(cache)

    def settings(max_train_steps: int) -> None:
        config = {
            "pretrained_model_name_or_path": train_config.pretrained_model_name_or_path,
            "num_controlnet_layers": 2,
            "train_batch_size": 1,
            "max_train_steps": max_train_steps,
            "checkpointing_steps": 100_000,
            "validation_steps": 0,
            "report_to": "none",
            "logging_steps": 1,
        }
        (tmp_path / "configs/sd35-medium.toml").write_text(toml("train", config))

    settings(100_000)
    job = slurm.start()
    until(lambda: "train: 1 of 100000 steps" in slurm.output.read_text(), job, slurm.output)
    slurm.warn(job)
    code = job.wait(WAIT_S)
    output = slurm.output.read_text()
    # Not COMPLETED: what waits for the job goes on waiting.
    assert code == 1, output
    assert slurm.requeued == 1, output
    assert "SignalException" in output
    (checkpoint,) = checkpoints.find(tmp_path / "out")
    step = checkpoints.read_state(checkpoint).step
    assert f"out: SIGTERM after step {step}; the same command goes on" in output
    assert not (tmp_path / "out/config.json").exists()
    settings(step + 1)
    assert slurm.start().wait(WAIT_S) == 0, slurm.output.read_text()
    assert slurm.requeued == 1
    assert f"out: ControlNet saved after {step + 1} steps" in slurm.output.read_text()


def test_a_training_job_that_fails_is_not_requeued(slurm_with: Callable[[str], Slurm]) -> None:
    script = changed(batch_script("many-gpus.md"), ("fsdp2.yaml", "absent.yaml"))
    slurm = slurm_with(script)
    assert slurm.start().wait(WAIT_S) == 1
    assert not slurm.requeued
    assert "absent.yaml" in slurm.output.read_text()


def test_stage_1_is_requeued_at_the_time_limit_and_goes_on_to_the_end(
    fresh: PrecomputeConfig, tmp_path: Path, slurm_with: Callable[[str], Slurm]
) -> None:
    script = changed(batch_script("workers.md"), ("fill50k.zip", str(fresh.source)), ("/16", "/1"))
    slurm = slurm_with(script)
    (tmp_path / "configs").mkdir()
    config = {
        "pretrained_model_name_or_path": fresh.pretrained_model_name_or_path,
        "resolution": fresh.resolution,
        "max_sequence_length": fresh.max_sequence_length,
        "cache_dtype": "float32",
        "text_dtype": "float32",
        "vae_batch_size": 1,
        "text_batch_size": 1,
        "shard_mb": fresh.shard_mb,
        "device": "cpu",
    }
    (tmp_path / "configs/sd35-medium.toml").write_text(toml("precompute", config))
    cache = tmp_path / "cache"
    job = slurm.start()
    until(lambda: bool(list(cache.glob("text/*.tar*"))), job, slurm.output)
    slurm.warn(job)
    assert job.wait(WAIT_S) == 143, slurm.output.read_text()
    assert slurm.requeued == 1
    assert "ended between shards; the same command goes on from here" in slurm.output.read_text()
    assert not (cache / MANIFEST).exists()
    assert slurm.start().wait(WAIT_S) == 0, slurm.output.read_text()
    assert slurm.requeued == 1
    assert (cache / MANIFEST).exists()
