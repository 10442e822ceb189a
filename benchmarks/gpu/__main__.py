"""`make gpu`, or `python -m benchmarks.gpu`: all that a machine with a GPU can say of this project.

The tests that need a GPU, then the benchmarks, each in a process of its own with a budget of time,
25 minutes together. Then JSON goes to benchmarks/results/gpu/ and tables to docs/gpu.md. A run that
was cut goes on where it was, unless code, machine, libraries or size are others. `--size tiny`
does all of it in small on any machine, and leaves results and page in runs/gpu-tiny/.
"""

import shutil
import signal
import sys
from pathlib import Path

import click
import torch

from benchmarks.gpu import steps
from benchmarks.gpu.record import REPOSITORY, Record, read_json
from benchmarks.gpu.tables import TABLES, fill
from common.atomic_files import write_text
from common.command import CONTEXT, CommandError
from common.provenance import machine

PAGE = Path("docs/gpu.md")
RESULTS = Path("benchmarks/results/gpu")
IN_SMALL = """**`SIZE=tiny`:** the figures show that everything runs, and nothing else.
What the text says of sizes, steps and seconds is true of the full size.

"""
SHOWN_LINES = 30  # of a failed step's log


@click.command(context_settings=CONTEXT)
@click.option("--size", type=click.Choice(["full", "tiny"]), default="full", show_default=True)
@click.option(
    "--work-dir",
    type=click.Path(path_type=Path),
    help="Logs, results and what is done; runs/gpu or runs/gpu-tiny if absent.",
)
@click.pass_context
def main(ctx: click.Context, size: steps.Size, work_dir: Path | None) -> None:
    """Run the tests that need a GPU and the benchmarks; write tables; exit 1 if a step failed."""
    if size == "full" and not torch.cuda.is_available():
        raise CommandError(
            "no GPU here that torch sees: SIZE=tiny tries all of it on the CPU. With a GPU, "
            "install torch's build for its driver into .venv: pytorch.org/get-started/locally."
        )
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    folder = (work_dir or Path("runs") / ("gpu" if size == "full" else "gpu-tiny")).absolute()
    whole = (
        f"at most {sum(steps.BUDGETS_S.values()) // 60} minutes" if size == "full" else "in small"
    )
    click.echo(f"{machine()}, {whole}")
    record = Record(folder, size)
    all_good = run_steps(record, folder, size)
    target = REPOSITORY if size == "full" else folder
    publish(folder / "results", target)
    click.echo(target / PAGE)
    ctx.exit(int(not all_good))


def run_steps(record: Record, folder: Path, size: steps.Size) -> bool:
    """Run the steps that are not done yet; return whether all are."""
    all_good = True
    for step in steps.plan(size, folder / "results"):
        if step.name in record.seconds:
            click.echo(f"{step.name:12} done already")
            continue
        log = folder / f"logs/{step.name}.log"
        limit = f"at most {step.budget_s} s, " if size == "full" else ""  # tiny's is a rescue
        click.echo(f"{step.name:12} {limit}{log}")
        code, seconds = steps.run(step, log, size)
        if code == 0:
            record.add(step.name, seconds)
            click.echo(f"{step.name:12} {seconds:.0f} s")
            continue
        all_good = False
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        why = f"cut after {seconds:.0f} s" if code == steps.CUT else f"exit code {code}"
        click.echo("\n".join([*lines, f"{step.name:12} {why}; the next run tries it again"]))
    return all_good


def publish(results: Path, target: Path) -> None:
    """Copy results to a folder laid out as this repository, and fill its page's tables."""
    figures = {}
    for name in TABLES:
        path = results / f"{name}.json"
        if (found := read_json(path)) is not None:
            figures[name] = found
            if target == REPOSITORY:
                (target / RESULTS).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / RESULTS)
    (target / PAGE).parent.mkdir(parents=True, exist_ok=True)
    page = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    note = "" if target == REPOSITORY else IN_SMALL
    write_text(target / PAGE, note + fill(page, figures))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu")
