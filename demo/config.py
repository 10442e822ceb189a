"""The settings of a whole demonstration: one TOML file, a table a stage."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.config_file import read_section
from common.errors import ConfigError
from common.options import option
from demo.circles import CirclesConfig, image_path, unseen_circles
from infer.config import GenerateConfig, ScoreConfig
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class ReportConfig:
    """The demonstration's own table, [demo]."""

    output_dir: Path = option(help="Where the report and the stages' times go.")

    @property
    def report(self) -> Path:
        """The page."""
        return self.output_dir / "report.html"

    @property
    def times(self) -> Path:
        """How long each stage took; see `demo.times`."""
        return self.output_dir / "times.json"


@dataclass(frozen=True)
class DemoConfig:
    """All tables of the file."""

    demo: ReportConfig
    circles: CirclesConfig
    precompute: PrecomputeConfig
    train: TrainConfig
    infer: GenerateConfig
    score: ScoreConfig


def load_config(path: Path) -> DemoConfig:
    """Return a demonstration's settings.

    Raises:
        ConfigError: a table or key is unknown, wrong or missing, or the report could not be made.
    """
    config = DemoConfig(
        demo=_table(path, "demo", ReportConfig),
        circles=_table(path, "circles", CirclesConfig),
        precompute=_table(path, "precompute", PrecomputeConfig),
        train=_table(path, "train", TrainConfig),
        infer=_table(path, "infer", GenerateConfig),
        score=_table(path, "score", ScoreConfig),
    )
    # The report shows score's first pictures without the ControlNet as validation before training.
    unseen = unseen_circles(config.circles)[: config.score.num_samples]
    pairs = [(circle.prompt, image_path(config.circles, k)) for k, circle in enumerate(unseen)]
    validation = config.precompute.validation_pairs()
    if validation != pairs[: len(validation)]:
        raise ConfigError(
            f"{path}: the validation pairs in [precompute] must be the first of the unseen circles "
            f"that [score] draws: {pairs[0][0]!r}, {pairs[0][1]}, and so on."
        )
    if config.train.report_to != "tensorboard":
        raise ConfigError(f"{path}: report_to in [train] must be tensorboard, for the loss curve.")
    return config


def _table(path: Path, section: str, config_class: type[Config]) -> Config:
    settings = read_section(path, section, config_class)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(config_class)  # type: ignore[arg-type]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in settings
    ]
    if missing:
        raise ConfigError(f"{path}: [{section}] lacks {', '.join(missing)}.")
    return config_class(**settings)
