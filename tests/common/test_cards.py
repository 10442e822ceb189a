"""`--card`: a preset under the command line's own settings, or the fastest that fits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from common import cards
from common.cards import Free, card_names, choose_card, gives_up
from common.command import stage_command
from common.config_file import read_section
from common.errors import ConfigError
from common.memory.need import Need
from common.options import option
from infer.config import GenerateConfig, ScoreConfig, ServeConfig
from precompute.config import PrecomputeConfig
from tests.conftest import REPOSITORY
from train.config import TrainConfig


@dataclass(frozen=True)
class Settings:
    """Do something."""

    size: int = option(9, help="size", heading="Work")
    fast: bool = option(False, help="fast")
    device: str | None = option(None, help="device")

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ConfigError("--size 13: is unlucky.")


seen: list[Settings] = []
Call = Callable[..., Result]


def needed(config: Settings, free: int | None) -> Need:
    return Need(config.size * 1_000_000_000, config.size * 1_000_000_000, "--slow" * config.fast)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    seen.clear()
    for name, size in (("80gb", 40), ("24gb", 13), ("12gb", 10), ("6gb", 5)):
        text = f'[gives_up]\ntrain = "speed"\n[train]\nsize = {size}\n'
        (tmp_path / f"{name}.toml").write_text(text + "fast = true\n" * (size == 10))
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    main = stage_command("test", Settings, seen.append, section="train", need=needed)
    return lambda *words: CliRunner().invoke(main, list(words))


def use_card(monkeypatch: pytest.MonkeyPatch, gigabytes: float, host: float = 100) -> None:
    free = Free(round(gigabytes * 1e9), round(host * 1e9), "a card")
    monkeypatch.setattr("common.command.free_memory_of", lambda device: free)


def test_a_preset_wins_over_files_and_the_command_line_over_it(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[train]\nsize = 7\nfast = true\n")
    files = ["--config", str(tmp_path / "run.toml")]
    assert call("--card", "6gb", *files).exit_code == 0
    assert call("--card", "6gb", *files, "--size", "8", "--no-fast").exit_code == 0
    assert seen == [Settings(5, fast=True), Settings(8)]


def test_an_unknown_preset_names_the_nearest(call: Call) -> None:
    result = call("--card", "12")
    assert result.exit_code == 2
    assert "--card 12: no such preset. Did you mean '12gb'?" in result.output
    assert "There are 6gb, 12gb, 24gb, 80gb, auto." in call("--card", "x").output
    assert seen == []
    assert call("--card", "6GB").exit_code == 0


def test_what_does_not_go_with_a_preset_names_it(call: Call) -> None:
    result = call("--card", "24gb")
    assert result.exit_code == 2
    assert "Error: with --card 24gb: --size 13: is unlucky." in result.output


def test_auto_takes_the_fastest_that_fits(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    # 10 GB of tensors need 11 free; 5 need 5.75.
    use_card(monkeypatch, 11)
    assert call("--card", "auto").output == (
        "--card auto: 11.0 GB of a card are free; 12gb, --slow needs 11.0 GB of it and 13.0 of "
        "host memory; gives up speed\n"
    )
    use_card(monkeypatch, 10.9)
    assert "; 6gb needs 5.8 GB of it" in call("--card", "auto").output
    use_card(monkeypatch, 11, host=12)  # 3 for the process itself
    assert "; 6gb needs 5.8 GB of it" in call("--card", "auto").output
    assert [one.size for one in seen] == [10, 5, 5]


def test_auto_refuses_where_nothing_fits(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    use_card(monkeypatch, 4)
    result = call("--card", "auto")
    assert result.exit_code == 2
    assert "4.0 GB of a card are free, and 100.0 GB of host memory; no preset" in result.output
    assert "  80gb needs 42.5 GB of it and 43.0 of host memory\n" in result.output
    assert "  24gb: with --card 24gb: --size 13: is unlucky.\n" in result.output
    assert "name one to try it nevertheless: --card 6gb." in result.output
    assert seen == []


def test_auto_changes_nothing_on_a_cpu(call: Call) -> None:
    result = call("--card", "auto", "--device", "cpu")
    assert result.output == ("--card auto: no graphics card computes here; nothing is changed\n")
    assert seen == [Settings(device="cpu")]


def test_auto_is_for_one_process(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("--card", "auto")
    assert result.exit_code == 2
    assert "with several, name the preset" in result.output


def test_presets_that_are_not_installed_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cards, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match="comes with the repository"):
        gives_up("6gb", "train")


def test_the_presets_are_read_by_all_stages() -> None:
    assert card_names() == ["80gb", "40gb", "24gb", "16gb", "12gb", "8gb", "6gb"]
    sections = {
        "precompute": PrecomputeConfig,
        "train": TrainConfig,
        "infer": GenerateConfig,
        "score": ScoreConfig,
        "serve": ServeConfig,
    }
    for name in card_names():
        for section, config_class in sections.items():
            path = REPOSITORY / f"configs/cards/{name}.toml"
            assert read_section(path, section, config_class) is not None
            assert gives_up(name, section).count("\n") == 0


def test_a_preset_whose_package_is_missing_is_passed_over() -> None:
    def need(config: str, free: int) -> Need:
        if config == "8 bit":
            raise ConfigError("bitsandbytes is not installed")
        return Need(1)

    configs: dict[str, str | ConfigError] = {"24gb": "8 bit", "6gb": "x"}
    assert choose_card(configs, need, Free(10**9, 10**10, "a card"), "train")[0] == "6gb"


def test_a_need_is_asked_with_the_free_memory() -> None:
    asked: list[int] = []

    def need(config: str, free: int) -> Need:
        asked.append(free)
        return Need(1)

    configs: dict[str, str | ConfigError] = {"6gb": "x"}
    assert choose_card(configs, need, Free(10**9, 10**10, "a card"), "train")[0] == "6gb"
    assert asked == [10**9]
