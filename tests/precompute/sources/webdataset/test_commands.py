"""`python -m precompute` on tars: what it prints, how it ends, and what it writes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Outcome
from tests.precompute.sources.webdataset.conftest import COLUMNS, samples, write_tar


@pytest.fixture
def arguments(base: Path, tmp_path: Path) -> list[object]:
    """Of a run on eight samples, the last of which lacks its conditioning image, and on two more
    of another split.
    """
    write_tar(tmp_path / "tars" / "a.tar", [*samples(range(7)), *samples([7])[::2]])
    write_tar(tmp_path / "tars" / "test.tar", samples([8, 9]))
    return [
        *("precompute", "--train-data-dir", tmp_path / "tars", "--cache", tmp_path / "cache"),
        *("--pretrained-model-name-or-path", base, "--cache-dir", tmp_path / "hub"),
        *("--resolution", 64, "--max-sequence-length", 20, "--device", "cpu"),
        *(
            word
            for name, value in COLUMNS.items()
            for word in (f"--{name.replace('_', '-')}", value)
        ),
    ]


LAYOUT = "layout: WebDataset, 1 tar\n  left out: 2 rows of split 'test' (test.tar)\n"
BAD_ROW = "row 7, a.tar/0007.jpg: no conditioning image: a.tar has no member 0007.png"


def test_two_samples_of_eight_are_too_many(
    arguments: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    lacking = [*samples([6])[::2], *samples([7])[::2]]
    write_tar(tmp_path / "tars" / "a.tar", [*samples(range(6)), *lacking])
    before = sorted(tmp_path.rglob("*"))
    outcome = command(*arguments)
    assert outcome.exit_code == 2
    assert BAD_ROW in outcome.output
    assert sorted(tmp_path.rglob("*.tar")) == [one for one in before if one.suffix == ".tar"]


@pytest.mark.slow
def test_the_run_and_its_rehearsal_say_what_is_left_out(
    arguments: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    outcome = command(*arguments, "--max-bad-fraction", 0.2, "--dry-run")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.startswith(LAYOUT)
    assert BAD_ROW in outcome.output
    assert sorted(tmp_path.rglob("*")) == before
    outcome = command(*arguments, "--max-bad-fraction", 0.2)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.startswith(LAYOUT)
    assert f"1 rows were left out:\n  {BAD_ROW}" in outcome.output
    assert not (tmp_path / "hub").exists()
    outcome = command(*arguments, "--max-bad-fraction", 0.2, "--split", "test", "--dry-run")
    assert "left out: 8 rows of files that name no split (a.tar)" in outcome.output
    assert "\n2 rows, 2 captions" in outcome.output


def test_other_splits_only(
    arguments: list[object], command: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "tars" / "a.tar").rename(tmp_path / "tars" / "val.tar")
    outcome = command(*arguments)
    assert outcome.exit_code == 2
    assert "no split 'train'; it has test, validation. Choose one: --split test." in outcome.output
    assert not (tmp_path / "cache").exists()
