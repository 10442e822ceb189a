"""Plant faults one at a time and count those that the tests find: `make mutate`.

Each fault of the table is planted in a copy of the repository, and its area's quick tests run
there. A fault is found if a test fails or does not end. See `table.py` for the table.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import click
import pytest

from tests.mutation.table import REPOSITORY, Area, Fault, read_areas

# The quick tests, to the first failure. The warning is of hypothesis, which is imported already.
PYTEST = [
    "-m",
    "not slow and not extras and not gpu and not network",
    "-x",
    "-p",
    "no:cacheprovider",
]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
# Tests that run this long after a fault was planted will not end.
TIMEOUT_S = 240
# Exit codes: tests failed; pytest was interrupted, as by an import that fails; SIGALRM.
FOUND = (1, 2, -signal.SIGALRM)
INTERNAL_ERROR = 3
REPORT = "pytest.out"


def copy_repository(folder: Path) -> None:
    """Copy all files that git knows, or would if they were added."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=REPOSITORY, text=True).split("\0")
    for name in filter(None, names):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)


def start_tests(folder: Path, tests: list[str]) -> int:
    """Run tests in a copy of the repository, in a fork of this process.

    The libraries, which take seconds to import, are there already.

    Returns:
        The number of the process that runs them.
    """
    if child := os.fork():
        return child
    code = INTERNAL_ERROR
    try:
        os.setsid()
        signal.alarm(TIMEOUT_S)
        output = os.open(folder / REPORT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        # Bytecode is told from stale bytecode by size and second: a fault may change neither.
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        _forget_our_modules()
        # Of its own: those that run beside it would tidy up one folder for all, and collide there.
        code = pytest.main([*PYTEST, f"--basetemp={folder}.tmp", *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _forget_our_modules() -> None:
    ours = {path.name for path in REPOSITORY.iterdir() if (path / "__init__.py").is_file()}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]


def run_all(
    tasks: Sequence[tuple[list[str], Fault | None]], jobs: int
) -> Iterator[tuple[int, bool]]:
    """Run tests with a fault each, some at a time.

    Args:
        tasks: tests, and the fault to plant or None.
        jobs: how many run at a time, each in a copy of the repository.

    Yields:
        (number of the task, whether its tests failed or did not end), in the order of their ends.

    Raises:
        click.ClickException: pytest did not run the tests.
    """
    with tempfile.TemporaryDirectory() as parent:
        free = [Path(parent) / str(number) for number in range(min(jobs, len(tasks)))]
        for folder in free:
            copy_repository(folder)
        running: dict[int, tuple[int, Path]] = {}
        waiting = deque(range(len(tasks)))
        try:
            while waiting or running:
                if waiting and free:
                    number, folder = waiting.popleft(), free.pop()
                    tests, fault = tasks[number]
                    if fault is not None:
                        plant(fault, folder)
                    running[start_tests(folder, tests)] = number, folder
                    continue
                child, status = os.wait()
                kill_group(child)
                number, folder = running.pop(child)
                if (fault := tasks[number][1]) is not None:
                    shutil.copy2(REPOSITORY / fault.file, folder / fault.file)
                free.append(folder)
                yield number, is_failure(os.waitstatus_to_exitcode(status), folder)
        finally:
            for child in running:
                kill_group(child)


def plant(fault: Fault, folder: Path) -> None:
    """Plant a fault in a copy of the repository."""
    path = folder / fault.file
    path.write_text(fault.planted(path.read_text(encoding="utf-8")), encoding="utf-8")


def kill_group(child: int) -> None:
    """Kill tests, and all that they started."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def is_failure(code: int, folder: Path) -> bool:
    """Return whether pytest's exit code says that tests failed or did not end.

    Raises:
        click.ClickException: pytest did not run them.
    """
    if code in (0, *FOUND):
        return code != 0
    output = (folder / REPORT).read_text(encoding="utf-8")
    raise click.ClickException(f"pytest ended with {code}:\n{output}")


def survivors(areas: dict[str, Area], jobs: int) -> dict[str, list[Fault]]:
    """Plant all faults of some areas.

    Args:
        areas: by name.
        jobs: how many faults are tried at a time.

    Returns:
        The faults that were not found, by area.

    Raises:
        click.ClickException: tests fail without any fault.
    """
    names = list(areas)
    for number, failed in run_all([(area.tests, None) for area in areas.values()], jobs):
        if failed:
            raise click.ClickException(f"The tests of {names[number]} fail without a fault.")
    faults = [(name, fault) for name, area in areas.items() for fault in area.fault]
    survived: dict[str, list[Fault]] = {name: [] for name in names}
    for number, found in run_all([(areas[name].tests, fault) for name, fault in faults], jobs):
        name, fault = faults[number]
        click.echo(f"{'found' if found else 'SURVIVED':9} {fault.file}: {fault.what}")
        if not found:
            survived[name].append(fault)
    return survived


def table(areas: dict[str, Area], survived: dict[str, list[Fault]]) -> str:
    """Return the score of each area as a Markdown table, and what was not found."""
    lines = ["| area | faults | found | |", "|---|---:|---:|---:|"]
    total = missed = 0
    for name, area in areas.items():
        total, missed = total + len(area.fault), missed + len(survived[name])
        lines.append(_row(name, len(area.fault), len(survived[name])))
    lines.append(_row("all", total, missed))
    for fault in (fault for faults in survived.values() for fault in faults):
        lines.append(f"\n- {fault.file}: {fault.what}. {fault.survives or 'NOT EXPECTED'}")
    return "\n".join(lines)


def _row(name: str, faults: int, missed: int) -> str:
    return f"| {name} | {faults} | {faults - missed} | {(faults - missed) / faults:.0%} |"


@click.command()
@click.argument("names", nargs=-1, metavar="[AREA]...", type=click.Choice(list(read_areas())))
@click.option("--jobs", type=click.IntRange(1), default=os.cpu_count() or 1, show_default=True)
def main(names: tuple[str, ...], jobs: int) -> None:
    """Plant the faults of AREAs, by default of all, and print how many the tests find."""
    areas = {name: area for name, area in read_areas().items() if not names or name in names}
    importlib.import_module("tests.conftest")
    survived = survivors(areas, jobs)
    click.echo(f"\n{table(areas, survived)}")
    unexpected = [fault for faults in survived.values() for fault in faults if not fault.survives]
    sys.exit(1 if unexpected else 0)


if __name__ == "__main__":
    main()
