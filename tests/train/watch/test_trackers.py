"""Trackers: those that accelerate drives, what they need, and the pictures that they get."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import ConfigError
from train import loop
from train.config import Tracker, TrainConfig
from train.run import train
from train.watch import trackers
from train.watch.trackers import check_tracker, log_pictures


def test_all_of_accelerates_trackers_are_offered() -> None:
    assert LOGGER_TYPE_TO_CLASS.keys() | {"all", "none"} <= set(get_args(Tracker))


@pytest.mark.parametrize(
    ("name", "installed", "expected"),
    [
        ("mlflow", ["tensorboard"], "mlflow is not installed: pip install mlflow"),
        ("all", [], "no tracker is installed"),
        ("of_tomorrow", ["tensorboard"], "pip install -U accelerate"),
        ("mlflow", ["mlflow"], None),
        ("all", ["mlflow"], None),
        ("none", [], None),
    ],
)
def test_a_missing_package_is_said(
    monkeypatch: pytest.MonkeyPatch, name: str, installed: list[str], expected: str | None
) -> None:
    available = [SimpleNamespace(value=each) for each in installed]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: available)
    if expected is None:
        check_tracker(name)
        return
    with pytest.raises(ConfigError, match=f"--report-to {name}: .*{expected}"):
        check_tracker(name)


def tracker_of(name: str, **parts: Any) -> Any:
    """Return accelerate's tracker of a name, without starting it."""
    made = object.__new__(LOGGER_TYPE_TO_CLASS[name])
    vars(made).update(parts)
    return made


def test_each_tracker_gets_pictures_as_it_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {name: MagicMock() for name in ("wandb", "swanlab", "aim")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    writer, task = MagicMock(), MagicMock()
    driven = [
        tracker_of("tensorboard", writer=writer),
        tracker_of("clearml", task=task),
        *(tracker_of(name, run=MagicMock(), writer=MagicMock()) for name in packages),
        *(tracker_of(name) for name in ("mlflow", "comet_ml", "dvclive", "trackio")),
    ]
    batch = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    accelerator: Any = SimpleNamespace(trackers=driven)
    log_pictures(accelerator, {"0: a disc": batch}, 7)
    (title, shown), options = writer.add_images.call_args
    assert (title, options) == ("0: a disc", {"global_step": 7, "dataformats": "NHWC"})
    assert np.array_equal(shown, batch)
    side_by_side = np.hstack([batch[0], batch[1]])
    reported = task.get_logger().report_image.call_args.kwargs
    assert reported["iteration"] == 7
    assert np.array_equal(np.asarray(reported["image"]), side_by_side)
    assert np.array_equal(np.asarray(packages["aim"].Image.call_args.args[0]), side_by_side)
    for name in ("wandb", "swanlab"):
        calls = packages[name].Image.call_args_list
        assert np.array_equal(np.stack([call.args[0] for call in calls]), batch)


def test_the_training_loss_is_logged_by_noise_level(
    train_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the samples between two levels, of all steps since the log before."""
    seen: list[tuple[float, float]] = []
    original = loop.batch_losses

    def batch_losses(
        batch: Any, controlnet: Any, transformer: Any, settings: Any, *others: Any
    ) -> Any:
        losses = original(batch, controlnet, transformer, settings, *others)
        index = (torch_sigmoid(batch.normal) * 1000).long().clamp(0, 999)
        seen.extend(zip(settings.sigmas[index].tolist(), losses.tolist(), strict=True))
        return losses

    monkeypatch.setattr(loop, "batch_losses", batch_losses)
    config = replace(train_config, logging_steps=2, report_to="tensorboard")
    train(replace(config, gradient_accumulation_steps=3))
    assert len(seen) == 4 * 3 * 2
    events = EventAccumulator(str(config.output_dir / "logs" / "train_controlnet")).Reload()
    for half, step in ((seen[:12], 2), (seen[12:], 4)):
        for level in range(8):
            expected = [loss for sigma, loss in half if level <= 8 * sigma < level + 1]
            if level == 7:
                expected += [loss for sigma, loss in half if sigma == 1]
            name = f"loss/level-{level}"
            known = name in events.Tags()["scalars"]
            logged = {event.step: event.value for event in events.Scalars(name)} if known else {}
            assert (step in logged) == bool(expected)
            if expected:
                assert logged[step] == pytest.approx(np.mean(expected), rel=1e-6)


def torch_sigmoid(normal: Any) -> Any:
    """Return logit_normal's density of timesteps: the logistic function of normal draws."""
    return 1 / (1 + (-normal).exp())
