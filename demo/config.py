"""The settings of a whole demonstration: TOML files with one table for each stage."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.config_file import config_files, read_section
from common.errors import ConfigError
from common.options import option
from demo.circles import CirclesConfig
from infer.config import GenerateConfig, ScoreConfig
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

Config = TypeVar("Config")


@dataclass(frozen=True)
class ReportConfig:
    """The settings in the table [demo]."""

    output_dir: Path = option(help="Folder of the report and of the stages' times.")

    @property
    def report(self) -> Path:
        """The page that the demonstration ends with."""
        return self.output_dir / "report.html"

    @property
    def times(self) -> Path:
        """How long each stage took, as `demo.times` writes it."""
        return self.output_dir / "times.json"


@dataclass(frozen=True)
class DemoConfig:
    """The settings of all stages."""

    demo: ReportConfig
    circles: CirclesConfig
    precompute: PrecomputeConfig
    train: TrainConfig
    infer: GenerateConfig
    score: ScoreConfig


def load_config(*paths: Path) -> DemoConfig:
    """Return a demonstration's settings.

    Args:
        paths: TOML files; a later one wins over those before it.

    Raises:
        ConfigError: a table or key is unknown, wrong or missing, or the report needs other values.
    """
    config = DemoConfig(
        demo=_read_table(paths, "demo", ReportConfig),
        circles=_read_table(paths, "circles", CirclesConfig),
        precompute=_read_table(paths, "precompute", PrecomputeConfig),
        train=_read_table(paths, "train", TrainConfig),
        infer=_read_table(paths, "infer", GenerateConfig),
        score=_read_table(paths, "score", ScoreConfig),
    )
    if config.train.report_to != "tensorboard":
        raise ConfigError(
            f"{_names(paths)}: report_to in [train] must be tensorboard, for the loss curve."
        )
    return config


def settings_text(paths: Sequence[Path]) -> str:
    """Return the text of TOML files, and of the files that they extend."""
    return "".join(file.read_text() for path in paths for file in config_files(path))


def _read_table(paths: Sequence[Path], section: str, config_class: type[Config]) -> Config:
    settings: dict[str, Any] = {}
    for path in paths:
        settings |= read_section(path, section, config_class)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(config_class)  # type: ignore[arg-type]
    missing = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.name not in settings
    ]
    if missing:
        raise ConfigError(f"{_names(paths)}: [{section}] lacks {', '.join(missing)}.")
    return config_class(**settings)


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
