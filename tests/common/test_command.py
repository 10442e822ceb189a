"""Users' errors as lines, of one process and of several."""

import click
import pytest
from click.testing import CliRunner

from common.command import user_errors
from common.errors import ConfigError, RunError
from train.processes.agreement import main_decides


def refuse() -> None:
    raise ConfigError("not this")


@click.command()
@click.argument("where")
def program(where: str) -> None:
    with user_errors():
        if where == "everywhere":
            main_decides(refuse)
        elif where == "wrapped":
            try:
                main_decides(refuse)
            except ConfigError as error:
                raise RunError("not this, so not that") from error
        else:
            refuse()


@pytest.mark.parametrize(
    ("where", "rank", "lines"),
    [
        ("everywhere", "0", ["Error: not this"]),
        ("everywhere", "1", []),
        ("wrapped", "0", ["Error: not this, so not that"]),
        ("wrapped", "1", []),
        # Perhaps no other process has met it.
        ("here", "0", ["Error: not this"]),
        ("here", "1", ["Error: not this"]),
        ("everywhere", None, ["Error: not this"]),
    ],
)
def test_what_all_processes_raise_is_said_once(
    monkeypatch: pytest.MonkeyPatch, where: str, rank: str | None, lines: list[str]
) -> None:
    main_decides(lambda: None)  # a process alone, whatever the environment says
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    done = CliRunner().invoke(program, [where])
    assert done.exit_code == 2
    assert done.output.splitlines() == lines
