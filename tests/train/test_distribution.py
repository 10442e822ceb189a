"""Strategies that training does not support, or not with some options."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from common.errors import ConfigError
from train import compatibility, distribution
from train.config import TrainConfig
from train.processes.sharding import clip_gradients
from train.processes.strategy import Strategy
from train.run import train
from train.saving import checkpoints


def accelerator(kind: DistributedType, **more: Any) -> Any:
    """Return what is read of an Accelerator."""
    stage = more.pop("stage", 2)
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": stage}})
    return SimpleNamespace(
        **{
            "distributed_type": kind,
            "gradient_accumulation_steps": 1,
            "num_processes": 2,
            "device": torch.device("cpu"),
            "mixed_precision": "bf16",
            "is_fsdp2": True,
            "deepspeed_plugin": plugin,
        }
        | more
    )


FSDP, DEEPSPEED = DistributedType.FSDP, DistributedType.DEEPSPEED
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (accelerator(DistributedType.MULTI_GPU), {"bf16_weights": True}, "each process would round"),
    (
        accelerator(DistributedType.NO, num_processes=1, mixed_precision="no"),
        {"bf16_weights": True},
        "--bf16-weights: goes with --mixed-precision bf16",
    ),
    (accelerator(FSDP), {"offload_optimizer": True}, "--offload-optimizer: accelerate's own"),
    (accelerator(DEEPSPEED), {"offload_activations": True}, "--offload-activations: accelerate's"),
    (accelerator(FSDP), {"offload_base": 1}, "--offload-base: blocks come and go on one device"),
    (accelerator(DEEPSPEED), {"offload_base": 1}, "--offload-base: blocks come and go on one"),
    (
        accelerator(DEEPSPEED),
        {"checkpointing": "selective"},
        "--checkpointing selective: with ZeRO-3 weights come and go within a block",
    ),
    (accelerator(DistributedType.MEGATRON_LM), {}, "set up for MEGATRON_LM"),
    (accelerator(FSDP, is_fsdp2=False), {}, "needs fsdp_version: 2"),
    (accelerator(FSDP), {"optimizer": "adamw8bit"}, "--optimizer adamw8bit: only adamw's"),
    (accelerator(DEEPSPEED), {"optimizer": "lion"}, "--optimizer lion: only adamw's state"),
    (accelerator(DEEPSPEED), {"ema_decay": 0.9}, "--ema-decay: DeepSpeed keeps"),
    (accelerator(DEEPSPEED), {"on_nonfinite": "skip"}, "--on-nonfinite skip: DeepSpeed"),
    (accelerator(DEEPSPEED, stage=1), {}, "ZeRO stage 1: use 2 or 3"),
    (
        accelerator(DistributedType.NO, gradient_accumulation_steps=4),
        {"gradient_accumulation_steps": 2},
        "--gradient-accumulation-steps 2: accelerate's own configuration says 4",
    ),
]


@pytest.mark.parametrize(("found", "settings", "message"), REFUSED)
def test_unsupported_strategies_and_options_are_refused(
    train_config: TrainConfig, found: Any, settings: dict[str, Any], message: str
) -> None:
    distribution.check(accelerator(FSDP), train_config)
    distribution.check(accelerator(DEEPSPEED, stage=3), train_config)
    with pytest.raises(ConfigError, match=message):
        distribution.check(found, replace(train_config, **settings))


@pytest.mark.parametrize(
    ("was", "processes", "now", "message"),
    [
        ("copies", 2, FSDP, "written with one process or DDP, and this is FSDP2"),
        ("fsdp", 2, DEEPSPEED, "written with FSDP2, and this is DeepSpeed"),
        ("deepspeed", 4, DEEPSPEED, "written by 4 processes of DeepSpeed, and these are 2"),
        ("deepspeed", 2, DEEPSPEED, None),
        ("fsdp", 8, FSDP, None),
        ("copies", 8, DistributedType.MULTI_GPU, None),
    ],
)
def test_checkpoints_resume_with_the_same_strategy(
    was: Strategy, processes: int, now: DistributedType, message: str | None
) -> None:
    state = checkpoints.TrainState(
        step=1,
        place=2,
        seed=0,
        shuffle_window=None,
        bucket_group=2,
        fingerprints={},
        distribution=was,
        num_processes=processes,
    )
    folder = Path("out/checkpoint-1")
    if message is None:
        compatibility.check_same_distribution(folder, state, accelerator(now))
        return
    with pytest.raises(ConfigError, match=message):
        compatibility.check_same_distribution(folder, state, accelerator(now))


@pytest.mark.parametrize("name", ["fp8", "BF16"])
def test_accelerate_may_ask_for_a_precision_that_training_lacks(
    name: str, train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)
    config = replace(train_config, mixed_precision=None)
    says = f"says mixed_precision: {name}; training supports no, fp16, bf16: give --mixed-precision"
    for run in (config, replace(config, estimate=True)):
        with pytest.raises(ConfigError, match=says):
            train(run)


def test_deepspeed_casts_no_inputs_and_adds_gradients_in_float32(train_config: TrainConfig) -> None:
    settings: dict[str, Any] = {"fp16": {"enabled": True, "auto_cast": True}}  # as accelerate does
    distribution._configure_deepspeed(settings, train_config)
    assert settings["fp16"] == {"enabled": True}
    assert settings["communication_data_type"] == "fp32"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    own: dict[str, Any] = {"communication_data_type": "bf16", "data_types": {}}
    distribution._configure_deepspeed(own, train_config)
    assert own["communication_data_type"] == "bf16"


@pytest.mark.parametrize(("skipped", "returned", "norm"), [(True, None, math.inf), (False, 3.0, 3)])
def test_a_step_that_deepspeed_left_out_has_no_finite_norm(
    skipped: bool, returned: float | None, norm: float
) -> None:
    of_deepspeed = accelerator(
        DEEPSPEED,
        clip_grad_norm_=lambda parameters, max_norm: returned,
        optimizer_step_was_skipped=skipped,
    )
    network = torch.nn.Linear(1, 1)
    assert float(clip_gradients(of_deepspeed, network, None, 1.0)) == norm
