"""`make fits`: a line for each stage and preset, from what the stages' own estimates say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.memory import fits
from common.errors import ConfigError
from common.memory.need import Need
from infer.config import GenerateConfig
from precompute.config import PrecomputeConfig
from tests.conftest import REPOSITORY
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
            if config.optimizer == "adamw8bit":
                raise ConfigError("--use-8bit-adam: is not here.")
            # 7.3 and 7.6 GB need 8.2 and 8.5: of 8 GiB, 8.59, 4 % are not free.
            least = 7_300_000_000 if config.offload_base == 38 else 7_600_000_000
            return Need(least if config.fused_backward_pass else 30_000_000_000)
        return Need(2_000_000_000, chosen="--offload model")

    monkeypatch.setattr(fits, "need", need)
    monkeypatch.setattr(fits, "map_in_processes", map)  # so that `asked` is seen here


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(fits.main, list(words))
    assert result.exit_code == code, result.output
    return result.output


OWN = """
[precompute]
pretrained_model_name_or_path = "own"
cache = "mycache"
resolution = 768
max_sequence_length = 154
[train]
cache = "mycache"
[infer]
controlnet = ["one", "two"]
combine = true
width = 640
height = 512
resolution = 512
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def test_what_fits_is_said_for_each_stage() -> None:
    output = run("--config", "configs/sd35-medium.toml", "--memory", "8")
    assert "A card of 8 GB has 8 GiB, which are 8.59 GB of 10^9 bytes" in output
    assert "; 8.25 without the 4% that a display and the driver take" in output
    lines = {tuple(line.split()[:2]): line.split()[2:] for line in output.splitlines() if line}
    assert lines["precompute", "16gb"] == ["14.0", "15.2", "3.0", "no"]
    assert lines["precompute", "12gb"] == ["5.4", "6.2", "16.0", "yes"]
    assert lines["train", "16gb"] == ["30.0", "32.0", "3.0", "no"]
    assert " ".join(lines["train", "12gb"]) == "--use-8bit-adam: is not here."
    assert lines["train", "8gb"] == ["7.6", "8.5", "3.0", "no"]
    assert lines["train", "6gb"] == ["7.3", "8.2", "3.0", "yes"]
    assert lines["infer", "80gb"] == ["2.0", "2.6", "3.0", "yes", "--offload", "model"]
    assert "\nprecompute: fits with CARD=12gb, which gives up speed: T5" in output
    assert "\ntrain: fits with CARD=6gb, which gives up precision: ControlNet" in output
    assert "\ninfer: fits with CARD=80gb" in output


def test_the_stages_are_asked_about_one_data_set(own: Path) -> None:
    """Neither the cache nor the ControlNet is there yet."""
    output = run("--config", str(own), "--memory", "6")
    assert output.startswith(
        "own, squares of 768 px, 154 T5 tokens\nnot looked at: cache of [train]"
    )
    ignored = "controlnet", "combine", "width", "height", "resolution"
    assert ", ".join(f"{name} of [infer]" for name in ignored) in output
    assert {(config.resolution, config.max_sequence_length) for config, _ in asked} == {(768, 154)}
    assert {config.pretrained_model_name_or_path for config, _ in asked} == {"own"}
    assert {type(config) for config, _ in asked} == {PrecomputeConfig, TrainConfig, GenerateConfig}
    assert all(config.estimate for config, _ in asked)
    # Six GiB are 6.44 GB, of which 6.18 are free.
    assert "train: does not fit with the 5 of 7 presets that could be counted" in output
    asked.clear()
    run("--config", str(own), "--memory", "6", "--resolution", "512")
    assert {config.resolution for config, _ in asked} == {512}


def test_the_demo_is_counted_before_it_ran() -> None:
    output = run("--config", "configs/demo.toml", "--memory", "80")
    assert "\ninfer: fits with CARD=80gb" in output
    assert {(config.resolution, config.max_sequence_length) for config, _ in asked} == {(128, 24)}


def test_buckets_are_said_to_be_larger(own: Path) -> None:
    own.write_text(OWN.replace("resolution = 768", "resolution = 512\nbuckets = true"))
    # 384 x 704 px have the most: 270336 to 262144.
    assert "the largest bucket has 3% more pixels" in run("--config", str(own), "--memory", "6")
    output = run("--config", str(own), "--memory", "6", "--resolution", "48", code=2)
    assert "--resolution 48: with --buckets it must be a multiple of 64" in output


def test_what_no_preset_goes_with_is_one_error(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def need(config: Any, _: int | None) -> Need:
        if isinstance(config, TrainConfig):
            raise ConfigError("own: no such folder.")
        return Need(1)

    monkeypatch.setattr(fits, "need", need)
    output = run("--config", str(own), "--memory", "8", code=2)
    assert output.endswith("\nError: train could not be counted: own: no such folder.\n")
    assert output.count("no such folder") == 1


def test_what_could_not_be_counted_is_not_said_not_to_fit() -> None:
    rows = [fits.Row("train", name, ConfigError(name)) for name in ("80gb", "6gb")]
    assert fits._verdict(rows, 1) == "could not be counted with any preset"
    rows.append(fits.Row("train", "6gb", Need(2)))
    assert fits._verdict(rows, 1).startswith("does not fit with the 1 of 3 presets that could")
    assert fits._verdict(rows[2:], 1) == "does not fit with any preset"


@pytest.mark.parametrize("memory", ["8", "8GB", "8gb", "8 GB", "8.0"])
def test_memory_is_a_number_of_gigabytes(own: Path, memory: str) -> None:
    assert "A card of 8 GB has 8 GiB" in run("--config", str(own), "--memory", memory)


def test_equal_settings_are_counted_once() -> None:
    run("--config", "configs/sd35-medium.toml", "--memory", "8")
    configs = [config for config, _ in asked if isinstance(config, PrecomputeConfig)]
    assert len(configs) == len(set(configs)) == 4


def test_a_published_base_needs_no_download() -> None:
    run("--config", "configs/sd3-medium.toml", "--memory", "8")
    folder = Path(asked[0][0].pretrained_model_name_or_path)
    assert folder.is_absolute()
    assert not folder.exists()  # temporary


WRONG = [
    (["--config", "configs/sd35-medium.toml"], "--memory: how many GB has the card?"),
    (["--memory", "8"], "--config or --pretrained-model-name-or-path: give a base model."),
    (["--memory", "8", "--config", "configs/sd35.toml"], "configs/sd35.toml: No such file"),
    (["--memory", "8", "--config", "configs/cards/8gb.toml"], "give a base model"),
    (
        ["--memory", "8", "--config", "configs/sd35-medium.toml", "--resolution", "1000"],
        "--resolution 1000: must be divisible by 16",
    ),
    (["--memory", "inf"], "'inf' is not a finite number."),
    (["--memory", "nan"], "'nan' is not a finite number."),
    (["--memory", "8MB"], "'8mb' is not a finite number."),
    (["--memory", "0.5"], "'0.5' is not in 1 to 10,000."),
    (["--memory", "1e300"], "'1e300' is not in 1 to 10,000."),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_what_is_forgotten_or_wrong_is_named(words: list[str], message: str) -> None:
    assert message in run(*words, code=2)
    assert not asked


def test_bases_that_differ_are_refused(own: Path) -> None:
    own.write_text(OWN.replace("[train]", '[train]\npretrained_model_name_or_path = "other"'))
    output = run("--config", str(own), "--memory", "8", code=2)
    assert "these differ: [precompute] own, [train] other. Give one" in output
    run("--config", str(own), "--memory", "8", "--pretrained-model-name-or-path", "third")
    assert {config.pretrained_model_name_or_path for config, _ in asked} == {"third"}


def test_arguments_are_checked_before_torch_is_imported() -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # its import fails
from click.testing import CliRunner
from benchmarks.memory import fits
for words, message in {WRONG!r}:
    output = CliRunner().invoke(fits.main, words).output
    assert message in output, output
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
