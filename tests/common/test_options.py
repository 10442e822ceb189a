"""Command lines and TOML files: one definition, the reference script's spelling, clear refusals."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from click.testing import CliRunner, Result

from common.checks import pair_up
from common.command import stage_command
from common.errors import ConfigError, ShardError
from common.memory.need import Need
from common.options import as_dict, option


@dataclass(frozen=True)
class Settings:
    """Do something."""

    source: Path = option(help="where from", heading="Data", aliases=("origin",))
    train_batch_size: int = option(4, help="samples", heading="Training")
    learning_rate: float = option(1e-4, help="rate")
    name: str | None = option(None, help="name")
    kind: Literal["one", "two"] = option("one", help="kind", aliases=("sort_of",))
    maybe: Literal["yes", "no"] | None = option(None, help="maybe")
    level: Literal["off", "half", "whole"] = option("off", help="level", switches={"on": "half"})
    fast: bool = option(False, help="fast")
    prompt: tuple[str, ...] = option((), help="prompts")
    weight: tuple[float, ...] = option((), help="weights")


@dataclass(frozen=True)
class Special(Settings):
    """Do something special."""

    more: int = option(1, help="more", heading="Special")
    own_rate: float = option(1.0, help="rate", heading="Training")


MISPLACED = {"--resolution": "see there.", "--crop": "leave it out."}
Call = Callable[..., Result]
seen: list[Settings] = []


@pytest.fixture
def call() -> Call:
    seen.clear()
    main = stage_command("test", Settings, seen.append, section="train", misplaced=MISPLACED)

    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


def test_flags_fill_the_dataclass(call: Call) -> None:
    result = call(
        "--source", "x", "--train-batch-size", 8, "--fast", "--kind", "two", "--maybe", "no"
    )
    assert result.exit_code == 0, result.output
    assert seen == [Settings(Path("x"), train_batch_size=8, fast=True, kind="two", maybe="no")]


def test_two_spellings_of_one_option_are_refused(call: Call, tmp_path: Path) -> None:
    result = call("--source", "x", "--origin", "y")
    assert result.exit_code == 2
    assert "--source and --origin are one option; give one." in result.output
    file = tmp_path / "run.toml"
    file.write_text('[train]\nsource = "x"\norigin = "y"\n')
    result = call("--config", file)
    assert result.exit_code == 2
    assert "source is given twice in [train], as 'origin' too" in result.output
    assert seen == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "fast"])
def test_numbers_must_be_finite(call: Call, tmp_path: Path, value: str) -> None:
    result = call("--source", "x", "--learning-rate", value)
    assert result.exit_code == 2
    assert f"'{value}' is not a finite number" in result.output
    if value != "fast":
        file = tmp_path / "run.toml"
        file.write_text(f'[train]\nsource = "x"\nlearning_rate = {value}\n')
        result = call("--config", file)
        assert result.exit_code == 2
        assert "learning_rate in [train]: expected a finite number" in result.output
    assert seen == []


def test_values_in_a_row_may_be_negative(call: Call) -> None:
    assert call("--source", "x", "--weight", "-1", "-.5", "2").exit_code == 0
    assert seen == [Settings(Path("x"), weight=(-1.0, -0.5, 2.0))]


def test_a_forgotten_option_is_named(call: Call) -> None:
    result = call("--train-batch-size", 8)
    assert result.exit_code == 2
    assert "Missing option '--source'" in result.output
    assert seen == []


@dataclass(frozen=True)
class Asked:
    """Work, or only say how much."""

    cache: str = option(help="what", unless="estimate")
    output: Path = option(help="where to", unless="estimate")
    prompt: tuple[str, ...] = option(help="prompts", unless="estimate")
    estimate: bool = option(False, help="say how much")


def test_an_option_is_not_required_where_a_flag_makes_it_needless(tmp_path: Path) -> None:
    asked: list[Asked] = []
    main = stage_command("test", Asked, asked.append, section="train")
    missing = CliRunner().invoke(main, ["--output", "x"])
    assert "Missing options '--cache', '--prompt'." in missing.output
    file = tmp_path / "run.toml"
    file.write_text('[train]\ncache = "c"\n')
    for words in (["--estimate", "--config", file], ["--config", file, "--estimate"]):
        assert CliRunner().invoke(main, list(map(str, words))).exit_code == 0
    assert CliRunner().invoke(main, ["--output", "x", "--estimate"]).exit_code == 0
    from_file, from_file_too, empty = asked
    assert from_file == from_file_too == Asked("c", Path(), (), estimate=True)
    assert empty == Asked("", Path("x"), (), estimate=True)


def test_the_help_says_when_it_is_not_required_and_has_the_card_beside_the_estimate() -> None:
    main = stage_command("test", Asked, [].append, section="train", need=lambda _, __: Need(0))
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    assert sum(line.endswith("[required unless --estimate]") for line in lines) == 3
    (card,) = (number for number, line in enumerate(lines) if "--card" in line)
    (estimate,) = (number for number, line in enumerate(lines) if "  --estimate /" in line)
    assert card < estimate < lines.index("General:")


def test_the_reference_scripts_spelling_works(call: Call) -> None:
    call("--source=x", "--train_batch_size=8", "--prompt", "a b", "c", "--learning_rate", "1e-5")
    assert seen == [
        Settings(Path("x"), train_batch_size=8, learning_rate=1e-5, prompt=("a b", "c"))
    ]


def test_a_file_gives_defaults_and_flags_win(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "[precompute]\nanything = 1\n"
        '[train]\nsource = "x"\nlearning-rate = 1\nprompt = ["p", "q"]\nfast = true\n'
    )
    call("--config", file, "--learning-rate", "0.5")
    assert seen == [Settings(Path("x"), learning_rate=0.5, prompt=("p", "q"), fast=True)]
    call("--learning-rate", "0.5", "--config", file, "--no-fast", "--prompt", "r")
    assert seen[1:] == [Settings(Path("x"), learning_rate=0.5, prompt=("r",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\ntrain_batchsize = 4",
            "'train_batchsize' in [train]. Did you mean 'train_batch_",
        ),
        ("[trian]\n", "unknown table [trian]. Did you mean 'train'?"),
        ("[train]\nlearning_rate = 'fast'", "learning_rate in [train]: expected float, found 'fa"),
        ("[train]\ntrain_batch_size = 1.5", "train_batch_size in [train]: expected int, found 1.5"),
        ("[train]\nprompt = 1", "prompt in [train]: expected str, found 1"),
        ("[train]\nkind = 'three'", "kind in [train]: 'three' is not one of 'one', 'two'"),
        ("[train\n", "not valid TOML"),
        ("train = 3", "train must be a table, [train], found 3"),
    ],
)
def test_a_wrong_file_is_refused(call: Call, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    result = call("--config", file, "--source", "x")
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert seen == []


def test_a_file_changes_the_one_that_it_extends(call: Call, tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    (tmp_path / "bases/first.toml").write_text(
        '[train]\nsource = "x"\nlearning_rate = 1.0\nname = "first"\n'
    )
    (tmp_path / "bases/second.toml").write_text(
        'extends = "first.toml"\n[train]\nlearning_rate = 2.0\n'
    )
    third = tmp_path / "third.toml"
    third.write_text('extends = "bases/second.toml"\n[train]\nname = "third"\n')
    assert call("--config", third).exit_code == 0
    assert seen == [Settings(Path("x"), learning_rate=2.0, name="third")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "none.toml"', "run.toml: extends 'none.toml', and "),
        ('extends = ""', "extends: expected a path, found ''"),
        ('[train]\nextends = "none.toml"', "extends belongs at the top, above all tables"),
        ('extend = "none.toml"', "unknown table [extend]. Did you mean 'extends'?"),
        ("extends = 3", "extends: expected a path, found 3"),
        ('extends = "run.toml"', "extends 'run.toml', which extends this file"),
    ],
)
def test_a_wrong_extension_is_refused(call: Call, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    result = call("--config", file, "--source", "x")
    assert result.exit_code == 2
    assert message in result.output


def test_a_missing_file_is_named(call: Call, tmp_path: Path) -> None:
    result = call("--config", tmp_path / "none.toml")
    assert result.exit_code == 2
    assert "none.toml: No such file" in result.output


def test_an_option_that_moved_says_where(call: Call) -> None:
    result = call("--source", "x", "--resolution", 512, "--no-crop", "--fast")
    assert result.exit_code == 2
    assert "--resolution: see there.\n" in result.output
    assert "--crop: leave it out.\n" in result.output


def test_another_name_of_an_option_works_and_is_not_in_the_help(call: Call, tmp_path: Path) -> None:
    assert call("--origin", "x", "--sort_of=two").exit_code == 0
    file = tmp_path / "run.toml"
    file.write_text('[train]\norigin = "y"\n')
    assert call("--config", file).exit_code == 0
    assert seen == [Settings(Path("x"), kind="two"), Settings(Path("y"))]
    assert "--origin" not in call("--help").output


def test_a_switch_stands_for_a_value(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[train]\nsource = "x"\nlevel = "whole"\n')
    config = ("--config", file)
    for arguments in (config, (*config, "--on"), (*config, "--no_on"), ("--source", "x", "--on")):
        assert call(*arguments).exit_code == 0
    assert [one.level for one in seen] == ["whole", "half", "off", "half"]
    for value, level in (("true", "half"), ("false", "off")):
        file.write_text(f'[train]\nsource = "x"\non = {value}\n')
        assert call(*config).exit_code == 0
        assert seen[-1].level == level
    assert call(*config, "--level", "whole").exit_code == 0
    assert seen[-1].level == "whole"


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (("--on", "--level", "whole"), "", "--on and --level are one option; give one."),
        (("--on=yes",), "", "--on: takes no value."),
        ((), 'on = true\nlevel = "half"', "level is given twice in [train], as 'level' too"),
        ((), 'on = "half"', "on in [train]: expected bool, found 'half'."),
    ],
)
def test_a_switch_beside_its_option_or_with_a_value_is_refused(
    call: Call, tmp_path: Path, arguments: tuple[str, ...], text: str, message: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[train]\n{text}\n")
    result = call("--source", "x", "--config", file, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_help_has_the_options_in_groups(call: Call) -> None:
    lines = call("--help").output.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Data:", "Training:", "General:"]
    place = {word: number for number, line in enumerate(lines) for word in line.split()}
    assert place["Data:"] < place["--source"] < place["Training:"] < place["--learning-rate"]
    assert place["--prompt"] < place["General:"] < place["--config"] < place["--help"]


def test_a_subclass_has_its_own_options_first_and_headings_merge() -> None:
    main = stage_command("test", Special, lambda _: None, section="train")
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Special:", "Training:", "Data:", "General:"]
    place = {word: number for number, line in enumerate(lines) for word in line.split()}
    assert place["--more"] < place["--own-rate"] < place["--train-batch-size"] < place["Data:"]


def test_an_unknown_option_names_the_nearest(call: Call) -> None:
    result = call("--source", "x", "--train-batchsize", 4)
    assert result.exit_code == 2
    assert "--train-batch-size" in result.output


@pytest.mark.parametrize(
    "error", [ConfigError("what to do"), ShardError("what to do"), OSError(28, "what to do", "f")]
)
def test_errors_end_in_one_line_and_exit_code_2(error: Exception) -> None:
    def fail(_: Settings) -> None:
        raise error

    main = stage_command("test", Settings, fail, section="train")
    result = CliRunner().invoke(main, ["--source", "x"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert result.output.endswith("what to do\n")


def test_too_little_memory_names_what_reduces_it() -> None:
    def fail(_: Settings) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    main = stage_command("test", Settings, fail, section="train")
    result = CliRunner().invoke(main, ["--source", "x"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: out of memory: CUDA out of memory. Other programs")
    # Of options it names none: this command may not have it.
    assert set(re.findall("--[a-z-]+", result.output)) == {"--help"}
    assert result.output.count("\n") == 1


def test_settings_become_plain_values() -> None:
    values = as_dict(Settings(Path("x"), prompt=("a",)))
    assert values["source"] == "x"
    assert values["prompt"] == ["a"]


def test_pairs_go_one_to_one_or_one_to_all() -> None:
    a, b = Path("a"), Path("b")
    assert pair_up(("p", "q"), (a, b), "--p", "--i") == [("p", a), ("q", b)]
    assert pair_up(("p",), (a, b), "--p", "--i") == [("p", a), ("p", b)]
    assert pair_up(("p", "q"), (a,), "--p", "--i") == [("p", a), ("q", a)]
    assert pair_up((), (), "--p", "--i") == []
    with pytest.raises(ConfigError, match="1 --p and 0 --i"):
        pair_up(("p",), (), "--p", "--i")
    with pytest.raises(ConfigError, match="0 --p and 1 --i"):
        pair_up((), (a,), "--p", "--i")
    with pytest.raises(ConfigError, match="2 --p and 3 --i"):
        pair_up(("p", "q"), (a, b, a), "--p", "--i")
