"""Twenty steps whose losses are written down: only what is meant to change them may."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.reference.runs import logged_losses
from tests.conftest import REPOSITORY
from train.config import TrainConfig
from train.run import train

GOLDEN = REPOSITORY / "tests" / "golden" / "losses.json"
SETTINGS: dict[str, dict[str, object]] = {
    "default": {},
    "velocities": {"precondition_outputs": 0},
    "uniform, weighted": {"weighting_scheme": "cosmap"},
    "mode": {"weighting_scheme": "mode"},
    "dropped prompts": {"proportion_empty_prompts": 0.5},
    "means and deviations": {"cache": "held_out"},
    "accumulated": {"train_batch_size": 1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_as_written_down(name: str, train_config: TrainConfig, held_out: Path) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/train/test_golden.py` writes them down anew."""
    settings = dict(SETTINGS[name])
    if "cache" in settings:
        settings["cache"] = (str(held_out),)
    config = replace(
        train_config,
        max_train_steps=20,
        checkpointing_steps=20,
        logging_steps=1,
        report_to="tensorboard",
        pooled_projection="prompt",
        **settings,
    )
    train(config)
    losses = logged_losses(config.output_dir)
    assert len(losses) == 20
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        golden[name] = losses
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    # Processors round differently, and twenty steps of AdamW carry that on.
    assert losses == pytest.approx(golden[name], rel=1e-4)
