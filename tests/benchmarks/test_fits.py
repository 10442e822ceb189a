"""`make fits`: a line for each stage and preset, from what the stages' own estimates say."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.memory import fits
from common.errors import ConfigError
from common.memory.need import Need
from infer.config import GenerateConfig
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

asked: list[tuple[Any, int | None]] = []


@pytest.fixture(autouse=True)
def _counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()

    def need(config: Any, free: int | None) -> Need:
        asked.append((config, free))
        if isinstance(config, PrecomputeConfig):
            # 5.4 and 14 GB of tensors need 6.17 and 15.2.
            whole = config.offload == "none"
            return Need(14_000_000_000 if whole else 5_400_000_000, 0 if whole else 13_000_000_000)
        if isinstance(config, TrainConfig):
            if config.use_8bit_adam:
                raise ConfigError("--use-8bit-adam: is not here.")
            return Need(7_700_000_000 if config.fused_backward_pass else 30_000_000_000)
        return Need(2_000_000_000, chosen="--offload model")

    stages = {"precompute": PrecomputeConfig, "train": TrainConfig, "infer": GenerateConfig}
    monkeypatch.setattr(fits, "STAGES", {name: (one, need) for name, one in stages.items()})


def run(*words: str) -> str:
    result = CliRunner().invoke(fits.main, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_what_fits_is_said_for_each_stage() -> None:
    output = run("--config", "configs/sd35-medium.toml", "--memory", "8")
    assert "A card of 8 GB has 8 GiB, which are 8.59 GB of 10^9 bytes" in output
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in output.splitlines() if line}
    assert lines["precompute", "16gb"] == ["14.0", "15.2", "3.0", "no"]
    assert lines["precompute", "12gb"] == ["5.4", "6.2", "16.0", "yes"]
    assert lines["train", "16gb"] == ["30.0", "32.0", "3.0", "no"]
    assert " ".join(lines["train", "12gb"]) == "--use-8bit-adam: is not here."
    assert lines["train", "8gb"] == ["7.7", "8.6", "3.0", "yes"]
    assert lines["infer", "80gb"] == ["2.0", "2.6", "3.0", "yes", "--offload", "model"]
    assert "\nprecompute: fits with CARD=12gb, which gives up speed: T5" in output
    assert "\ntrain: fits with CARD=8gb, which gives up precision: ControlNet" in output
    assert "\ninfer: fits with CARD=80gb" in output


def test_the_stages_are_asked_about_one_data_set(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[precompute]\nresolution = 768\nmax_sequence_length = 154\ntext_dtype = "bfloat16"\n'
    )
    output = run("--config", str(file), "--pretrained-model-name-or-path", "own", "--memory", "6")
    assert {(config.resolution, config.max_sequence_length) for config, _ in asked} == {(768, 154)}
    assert {config.pretrained_model_name_or_path for config, _ in asked} == {"own"}
    assert all(config.estimate for config, _ in asked)
    # Six GiB are 6.44 GB.
    assert "train: does not fit with any preset" in output
    asked.clear()
    run("--config", str(file), "--pretrained-model-name-or-path", "own", "--memory", "6",
        "--resolution", "512")  # fmt: skip
    assert {config.resolution for config, _ in asked} == {512}


def test_equal_settings_are_counted_once() -> None:
    run("--config", "configs/sd35-medium.toml", "--memory", "8")
    configs = [config for config, _ in asked if isinstance(config, PrecomputeConfig)]
    assert len(configs) == len(set(configs)) == 3


def test_a_published_base_needs_no_download() -> None:
    run("--config", "configs/sd3-medium.toml", "--memory", "8")
    folder = Path(asked[0][0].pretrained_model_name_or_path)
    assert folder.is_absolute()
    assert not folder.exists()  # temporary


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "configs/sd35-medium.toml"], "--memory: how many GB has the card?"),
        (["--memory", "8"], "--config or --pretrained-model-name-or-path: give a base model."),
        (["--memory", "8", "--config", "configs/sd35.toml"], "configs/sd35.toml: No such file"),
        (["--memory", "8", "--config", "configs/cards/8gb.toml"], "give a base model"),
    ],
)
def test_what_is_forgotten_is_named(words: list[str], message: str) -> None:
    result = CliRunner().invoke(fits.main, words)
    assert result.exit_code == 2
    assert message in result.output
