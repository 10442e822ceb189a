"""A disk that is full when the ControlNet is saved: its last checkpoint holds it."""

from dataclasses import replace

import pytest

from tests.conftest import flags, free_port, run_python
from tests.train.test_run import same
from train.config import TrainConfig
from train.run import train

PROGRAM = ("-m", "tests.train.saving.full_disk")
LAUNCH = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_at_the_end_says_what_holds_the_controlnet(
    train_config: TrainConfig, processes: int
) -> None:
    config = replace(train_config, train_batch_size=2 // processes, ema_decay=0.5)
    launch = (*LAUNCH, free_port()) if processes > 1 else ()
    done = run_python(*launch, *PROGRAM, *flags(config), ACCELERATE_USE_CPU="true")
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.stderr
    if processes == 1:
        assert done.returncode == 2
    folder = config.output_dir
    for line in errors:
        assert line.startswith(f"Error: {folder}: the ControlNet could not be written (")
        assert "File too large" in line
        assert line.endswith(
            "); checkpoint-4 holds it. Make room; then the same command with "
            "--resume-from-checkpoint latest finishes."
        )
    assert not list(folder.rglob("controlnet.partial"))
    assert not (folder / "config.json").exists()
    if processes == 1:
        train(replace(config, resume_from_checkpoint="latest"))
        assert same(folder / "checkpoint-4/controlnet", folder)
        assert same(folder / "checkpoint-4/controlnet_ema", folder / "controlnet_ema")
