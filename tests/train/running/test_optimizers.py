"""Runs with each optimiser: they resume to the bit, with no other optimiser's state."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.errors import ConfigError
from tests.conftest import Outcome
from tests.train.test_run import WEIGHTS, same
from train.config import TrainConfig
from train.run import train
from train.validation import pictures

extras = pytest.mark.extras
RUNS: list[Any] = [
    pytest.param({"optimizer": "adafactor"}, marks=pytest.mark.slow),
    *(
        pytest.param(settings, marks=[pytest.mark.slow, extras])
        for settings in (
            {"optimizer": "adamw8bit"},
            {"optimizer": "lion", "learning_rate": 1e-4},
            {"optimizer": "prodigy", "learning_rate": 1.0, "optimizer_args": ("d_coef=2.0",)},
            {"optimizer": "schedulefree", "lr_scheduler": "constant_with_warmup"},
        )
    ),
]


@pytest.mark.parametrize("settings", RUNS)
def test_resuming_ends_where_the_undisturbed_run_does(
    settings: dict[str, Any], train_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(train_config, **settings)
    train(config)
    undisturbed = replace(config, output_dir=tmp_path / "other", checkpointing_steps=4)
    train(undisturbed)
    assert same(config.output_dir, undisturbed.output_dir)
    resumed = replace(config, output_dir=tmp_path / "resumed", resume_from_checkpoint="latest")
    shutil.copytree(config.output_dir / "checkpoint-2", resumed.output_dir / "checkpoint-2")
    train(resumed)
    assert same(config.output_dir, resumed.output_dir)


@extras
def test_schedulefree_saves_and_validates_the_average(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def validate(run: Any, step: int) -> dict[str, list[float]]:
        network = run.accelerator.unwrap_model(run.controlnet)
        seen.append({name: one.clone() for name, one in network.state_dict().items()})
        return {}

    monkeypatch.setattr(pictures, "validate", validate)
    config = replace(train_config, lr_scheduler="constant", validation_steps=2)
    train(replace(config, optimizer="schedulefree", optimizer_args=("betas=(0.75, 0.99)",)))
    checkpoint = config.output_dir / "checkpoint-4"
    saved = load_file(checkpoint / "controlnet" / WEIGHTS)
    states = torch.load(checkpoint / "optimizer.bin")["state"].values()
    # What is trained lies between the average and the base sequence z: a quarter from the average.
    averages = [(one["trained"] - 0.25 * one["z"]) / 0.75 for one in states if "z" in one]
    assert len(averages) > 20
    for average in averages:
        assert any(
            average.shape == one.shape and torch.allclose(average, one, atol=1e-6)
            for one in saved.values()
        )
    assert any(not torch.equal(one["trained"], one["z"]) for one in states if "z" in one)
    assert len(seen) == 3  # at steps 0, 2 and 4
    for found in (seen[-1], load_file(config.output_dir / WEIGHTS)):
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": "adafactor"}, "--optimizer was adamw and is adafactor. Give what it was"),
    ({"optimizer_args": ("amsgrad=True",)}, "--optimizer-args was not given and is amsgrad=True."),
    ({"adam_weight_decay": 0.5}, "--adam-weight-decay was 0.01 and is 0.5."),
]


def test_other_arguments_are_refused_when_a_run_is_resumed(train_config: TrainConfig) -> None:
    train(replace(train_config, max_train_steps=1))
    for changes, message in OTHERS:
        with pytest.raises(ConfigError) as caught:
            train(replace(train_config, resume_from_checkpoint="latest", **changes))
        assert "checkpoint-1: holds the state of another optimiser: " in str(caught.value)
        assert message in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "optimizer"),
    [
        ((), "lion"),
        (("--use_8bit_adam",), "adamw8bit"),
        (("--no-use-8bit-adam",), "adamw"),
        (("--optimizer", "my.module:Own"), "my.module:Own"),
    ],
)
def test_the_references_flag_is_one_of_the_names(
    arguments: tuple[str, ...],
    optimizer: str,
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("train.run.train", seen.append)
    (tmp_path / "run.toml").write_text('[train]\noptimizer = "lion"\n')
    base = ("--pretrained-model-name-or-path", "x", "--cache", "x")
    given = ("--optimizer-args", "betas=0.9,0.99", "foreach=False")
    if optimizer.startswith("adamw"):
        given = ()
    command("train", "--config", tmp_path / "run.toml", *base, *given, *arguments)
    assert [config.optimizer for config in seen] == [optimizer]
    assert [config.optimizer_args for config in seen] == [given[1:]]
