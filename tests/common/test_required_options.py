"""Every command names all required options that are missing, at once."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.conftest import REPOSITORY

# What `python -m` runs: a package's __main__, or a file with a `main` of its own.
PROGRAMS = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    for path in REPOSITORY.glob("[!.]*/**/*.py")
    if "tests" not in path.relative_to(REPOSITORY).parts
    and "\nif __name__ == " in path.read_text(encoding="utf-8")
)


def commands(program: str) -> Iterator[click.Command]:
    """Yield a program's command, or the commands of its group."""
    main = importlib.import_module(program).main
    if isinstance(main, click.Group):
        yield from main.commands.values()
    elif isinstance(main, click.Command):
        yield main


def required(command: click.Command) -> list[click.Parameter]:
    return [parameter for parameter in command.params if parameter.required]


def given(parameters: list[click.Parameter], file: Path) -> list[str]:
    """Return a command line with a value for each parameter."""
    words = []
    for parameter in parameters:
        words += [parameter.opts[-1]] if isinstance(parameter, click.Option) else []
        words.append(str(file))
    return words


def test_all_programs_are_found() -> None:
    found = {command.name for program in PROGRAMS for command in commands(program)}
    stages = {"precompute", "train", "generate", "score", "serve", "decode", "export", "show"}
    assert found >= stages | {"info", "seal", "verify", "preview", "pull", "push", "circles"}
    assert "benchmarks.train_step" in PROGRAMS
    assert "demo.__main__" in PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_missing_options_are_named_all_at_once(program: str, tmp_path: Path) -> None:
    file = tmp_path / "value"
    file.touch()
    for command in commands(program):
        needed = required(command)
        # Of the arguments, which have no names on the command line, it is the last that is missed.
        arguments = [one for one in needed if isinstance(one, click.Argument)]
        for absent in [one for one in needed if one not in arguments[:-1]]:
            rest = [parameter for parameter in needed if parameter is not absent]
            check_named(command, given(rest, file), [absent])
        if needed:
            check_named(command, [], needed)


def check_named(command: click.Command, words: list[str], absent: list[click.Parameter]) -> None:
    """Check that a command line without some parameters ends in a line that names just these."""
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 2, f"{command.name} {words}: {done.output}"
    line = done.output.strip().splitlines()[-1]
    assert line.startswith("Error: Missing "), line
    names = {
        one.opts[-1] if isinstance(one, click.Option) else one.make_metavar(click.Context(command))
        for one in absent
    }
    assert set(re.findall(r"'([^']+)'", line)) == names
