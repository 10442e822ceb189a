"""What ships, bfloat16 with each of configs/accelerate/, on two processes beside one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.reference.runs import logged_losses
from tests.train.precision.records import Records, read, recorded
from tests.train.test_processes import DEEPSPEED, train_sharded
from tests.train.test_run import near_gradient_descent, weights
from train import models
from train.config import TrainConfig
from train.run import train

pytestmark = pytest.mark.slow

# bfloat16 keeps 8 significant bits: rounding changes a number by at most 2**-8 of it. One process
# and two do the same arithmetic on each sample, and differ where samples are summed: they round
# each sample's gradient, or the sum. DeepSpeed also rounds the weights between steps.
ERROR = 2**-8


@pytest.fixture
def config(train_config: TrainConfig, held_out: Path) -> TrainConfig:
    """Four steps of two batches in the precision that accelerate's configuration says."""
    return replace(
        near_gradient_descent(train_config),
        cache=(str(held_out),),
        mixed_precision=None,
        lr_scheduler="constant",
        max_grad_norm=0.0,
        train_batch_size=1,
        gradient_accumulation_steps=2,
        checkpointing="full",
        logging_steps=1,
        report_to="tensorboard",
        validation_steps=4,
        num_validation_images=1,
        validation_inference_steps=1,
    )


def all_timesteps(records: list[Records], network: str) -> list[float]:
    return sorted(float(one) for part in records for one in torch.cat(part.timesteps[network]))


def update(folder: Path, initial: dict[str, Tensor]) -> Tensor:
    """Return what training added to the weights, as one vector."""
    final = weights(folder)
    return torch.cat([(final[name] - tensor).flatten() for name, tensor in initial.items()])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", *DEEPSPEED])
def test_in_bfloat16_it_is_the_training_of_one_process(
    name: str, config: TrainConfig, base: Path, tmp_path: Path
) -> None:
    one = replace(config, mixed_precision="bf16", train_batch_size=2)
    with recorded() as alone:
        train(one)
    two = replace(config, output_dir=tmp_path / "two")
    train_sharded(name, two, RECORDS=str(tmp_path))
    ranks = [read(tmp_path / f"{rank}.pt") for rank in range(2)]

    for network in ("SD3ControlNetModel", "SD3Transformer2DModel"):
        assert all_timesteps(ranks, network) == all_timesteps([alone], network)
    for rank in ranks:
        # Nothing is cast on the way into a network: timesteps stay exact, all else is bfloat16.
        assert rank.dtypes == alone.dtypes
        # Most sums of bfloat16 numbers need more bits. A gradient that passed through bfloat16 on
        # its way to the optimiser needs none.
        assert len(rank.finer) >= 3
        assert min(rank.finer) > 0.25

    assert logged_losses(two.output_dir) == pytest.approx(logged_losses(one.output_dir), rel=ERROR)
    network = models.new_controlnet(base, None, config.num_controlnet_layers)
    initial = {name: tensor.detach() for name, tensor in network.named_parameters()}
    right = update(one.output_dir, initial)
    if name.startswith("zero"):  # DeepSpeed's exact weights start as the rounded ones
        initial = {key: tensor.bfloat16().float() for key, tensor in initial.items()}
    found = update(two.output_dir, initial)
    assert (found - right).norm() < ERROR * right.norm()
