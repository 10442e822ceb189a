"""Trackers: all that accelerate drives, by its names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigError
from common.options import as_dict
from train.config import TrainConfig

# Their accelerate trackers take each picture alone, others a batch of them.
ONE_PICTURE = ("aim", "clearml")


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed, which accelerate leaves out in silence.

    Args:
        name: as `--report-to` takes it.

    Raises:
        ConfigError: saying what to install.
    """
    if name == "none":
        return
    installed = [str(each.value) for each in get_available_trackers()]
    if name == "all":
        if not installed:
            raise ConfigError("--report-to all: no tracker is installed; pip install tensorboard.")
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ConfigError(
            f"--report-to {name}: this accelerate does not know it; pip install -U accelerate."
        )
    if name not in installed:
        raise ConfigError(f"--report-to {name}: {name} is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: TrainConfig) -> None:
    """Start the run's trackers, if it has any, and give them its settings."""
    if accelerator.log_with:
        flat = {key: _flat(value) for key, value in as_dict(config).items()}
        accelerator.init_trackers(config.tracker_project_name, config=flat)


def _flat(value: Any) -> Any:
    """Return a setting as trackers take it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value


def log_pictures(
    accelerator: Accelerator, pictures: Mapping[str, NDArray[np.uint8]], step: int
) -> None:
    """Show pictures in those trackers that show pictures through accelerate.

    Args:
        accelerator: with its trackers.
        pictures: by title, of one size each, [B, H, W, 3].
        step: that they are of.
    """
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for title, batch in pictures.items():
            shown: Any = batch
            if tracker.name in ONE_PICTURE:
                shown = Image.fromarray(np.concatenate(list(batch), axis=1))
            tracker.log_images({title: shown}, step=step, **layout)
