"""`make gpu`: what it runs, where it goes on, and the tables that it writes."""

import fcntl
import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import train_step
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import record, steps, tables
from benchmarks.gpu.record import Record, read_json
from benchmarks.gpu.steps import Step
from tests.conftest import REPOSITORY, run_python

PAGE = REPOSITORY / "docs/gpu.md"
RESULTS = REPOSITORY / "benchmarks/results"
ABOUT = {"machine": "a card", "versions": {"torch": "9.9"}, "commit": "0123456789abcdef"}


def python(code: str, name: str = "step", budget_s: int = 60) -> Step:
    return Step(name, ("-c", code), budget_s)


def test_the_page_is_that_of_the_results() -> None:
    found = {name: read_json(RESULTS / f"gpu/{name}.json") for name in tables.TABLES}
    results = {name: figures for name, figures in found.items() if figures is not None}
    page = PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, results) == page


def test_a_page_keeps_everything_but_its_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    figures = ABOUT | {"key": ABOUT, "seconds": {"tests": 90.4, "loader": 30.0}}
    filled = tables.fill(page, {"run": figures})
    assert "| loader | 30 |\n| in all | 120 |\n\n<!-- end -->\n\n## Training steps" in filled
    assert filled.count(tables.NOT_MEASURED) == len(tables.TABLES) - 1
    assert tables.fill(filled, {}) == tables.fill(page, {})
    for wrong in (
        page.replace("<!-- table: run -->", "<!-- table: ran -->"),
        page.replace("<!-- table: run -->", ""),
        page + "\n<!-- table: run -->\n",
        page + "\n<!-- table: run -->\n\n<!-- end -->\n",
    ):
        with pytest.raises(ValueError, match="table"):
            tables.fill(wrong, {})


def test_the_table_of_training_steps() -> None:
    good = {
        "name": "plain, batch 4",
        "px": 512,
        "samples": 4,
        "samples_per_second": 8.0,
        "tflops": 100.0,
        "of_matrix_rate": 0.25,
        "measured_bytes": 20_000_000_000,
        "estimated_bytes": {"frozen base": 9_000_000_000, "ControlNet": 10_000_000_000},
    }
    bad = {"name": "large", "px": 1024, "failed": "out of memory"}
    figures = ABOUT | {"base": "sd3-medium", "matrix_tflops": 400.0, "rows": [good, bad]}
    lines = tables.train_step_table(figures).splitlines()
    assert lines[0] == (
        "a card, torch 9.9, 0123456789ab, sd3-medium; "
        "large matrix products in bfloat16 reach 400.0 TFLOP/s"
    )
    assert lines[-2] == "| plain, batch 4 | 512 | 4 | 8.00 | 100.0 | 25% | 20.00 | 0.95 |"
    assert lines[-1].startswith("| large | 1024 | out of memory | ")
    assert {line.count("|") for line in lines[2:]} == {9}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("precompute", "| latents | 5.2 | 100% | 0.1 |"),
        ("presets", "| float32 | 0.3226 | 1.000 | 1.02 |"),
        ("loader", "| ours, 1 thread | 3.08 | 1541 | 0.48 |"),
    ],
)
def test_results_of_the_benchmarks_become_tables(name: str, row: str) -> None:
    figures = json.loads((RESULTS / f"{name}.json").read_text())
    first, blank, *lines = tables.TABLES[name](figures).splitlines()
    assert first.startswith(f"2 CPU cores, torch {figures['versions']['torch']}, ")
    assert not blank
    assert row in lines
    assert len({line.count("|") for line in lines}) == 1


def test_budgets_are_those_of_the_page() -> None:
    plan = steps.plan("full", Path("results"))
    assert sum(step.budget_s for step in plan) == 25 * 60
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", PAGE.read_text(), re.MULTILINE)
    assert [(step.name, str(step.budget_s)) for step in plan] == rows
    assert [step.name for step in steps.plan("tiny", Path("results"))] == [row[0] for row in rows]


def test_make_starts_it() -> None:
    shown = subprocess.run(
        ["make", "-n", "gpu", "SIZE=tiny"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout
    assert 'python -m benchmarks.gpu --size "tiny"' in shown
    assert re.search(r"pip install .*-c constraints.txt -e \"\.\[bitsandbytes\]\"", shown)


def test_a_step_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    held = tmp_path / "held"
    child = (
        "import fcntl, time\n"
        f"file = open({str(held)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    found, seconds = steps.run(python(code, budget_s=3), tmp_path / "log", "tiny")
    assert found == steps.CUT
    assert seconds >= 3
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits for the child's end
    assert time.monotonic() - start < 30


def test_tiny_sees_no_gpu(tmp_path: Path) -> None:
    names = "os.environ['CUDA_VISIBLE_DEVICES'], os.environ['GPU_TESTS_ON']"
    code = f"import os; print({names}); raise SystemExit(3)"
    assert steps.run(python(code), tmp_path / "log", "tiny")[0] == 3
    assert (tmp_path / "log").read_text() == " cpu\n"


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, mark = tmp_path / "work", tmp_path / "mark"
    plan = [
        python(f"open({str(tmp_path / 'count')!r}, 'a').write('1')", "one"),
        python(f"import os; raise SystemExit(not os.path.exists({str(mark)!r}))", "two"),
        python("print('three')", "three"),
    ]
    monkeypatch.setattr(steps, "plan", lambda size, results: plan)
    arguments = ["--size", "tiny", "--work-dir", str(work)]
    first = CliRunner().invoke(program.main, arguments)
    assert first.exit_code == 1
    assert re.search(r"^two +exit code 1; the next run tries it again$", first.output, re.M)
    assert list(Record(work, "tiny").seconds) == ["one", "three"]
    mark.touch()
    second = CliRunner().invoke(program.main, arguments)
    assert second.exit_code == 0, second.output
    assert second.output.count("done already") == 2
    assert (tmp_path / "count").read_text() == "1"
    assert (work / "logs/three.log").read_text() == "three\n"
    page = (work / "docs/gpu.md").read_text()
    assert "| two | " in page
    # Another size, machine or code begins anew.
    assert not Record(work, "full").seconds
    Record(work, "full").add("one", 1.0)
    monkeypatch.setattr(record, "machine", lambda: "another card")
    assert not Record(work, "full").seconds
    assert not (work / "logs/three.log").exists()


def test_what_a_result_depends_on(tmp_path: Path) -> None:
    for name in ("train/loop.py", "configs/cards/8gb.toml", "constraints.txt", "docs/gpu.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    before = record.digest(tmp_path)
    for name in ("docs/gpu.md", ".venv/lib/a.py", "runs/a.py", "benchmarks/results/gpu/run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("two")
        assert record.digest(tmp_path) == before
    seen = {before}
    for name in ("train/loop.py", "configs/cards/8gb.toml", "constraints.txt", "train/new.py"):
        (tmp_path / name).write_text("two")
        seen.add(record.digest(tmp_path))
    assert len(seen) == 5


def test_rows_of_the_same_code_are_kept(tmp_path: Path) -> None:
    row = {"name": "plain", "px": 512, "failed": "out of memory"}
    figures = ABOUT | {"base": "tiny", "rows": [row]}
    (tmp_path / "a.json").write_text(json.dumps(figures))
    found = train_step.read_rows(tmp_path / "a.json", figures)
    assert found == {("plain", 512): row}
    for other in ({"commit": "other"}, {"machine": "other"}, {"base": "other"}):
        assert train_step.read_rows(tmp_path / "a.json", figures | other) == {}
    assert train_step.read_rows(tmp_path / "none.json", figures) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_type(tmp_path: Path) -> None:
    done = CliRunner().invoke(program.main, ["--work-dir", str(tmp_path / "work")])
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "SIZE=tiny" in done.output
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
@pytest.mark.extras
def test_all_of_it_in_small(tmp_path: Path) -> None:
    before = PAGE.read_bytes()
    done = run_python(
        *("-m", "benchmarks.gpu", "--size", "tiny", "--work-dir", tmp_path), OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "at most" not in done.stdout  # the budgets are a card's
    page = (tmp_path / "docs/gpu.md").read_text()
    assert page.startswith(program.IN_SMALL)
    assert tables.NOT_MEASURED not in page
    rows = dict(re.findall(r"table: (\w+) -->(.*?)<!-- end", page, re.DOTALL))
    assert rows.keys() == tables.TABLES.keys()
    for row in train_step.rows("tiny"):
        assert f"| {row.name} | 256 | " in rows["train_step"]
    assert PAGE.read_bytes() == before
    again = run_python("-m", "benchmarks.gpu", "--size", "tiny", "--work-dir", tmp_path)
    assert again.returncode == 0
    assert again.stdout.count("done already") == len(tables.TABLES)
    assert shlex.split(again.stdout)[-1] == str(tmp_path / "docs/gpu.md")
