"""What the page is made from: the run's own files, so that a resumed run goes on with the same.

progress.jsonl                  a line a log, as the trackers get it
validation/step-*/              held_out.json and pictures
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.atomic_files import write_text

LOG_FILE = "progress.jsonl"
STEP = "step"


@dataclass(frozen=True)
class Records:
    """What is known of a run.

    Attributes:
        logged: values by curve's name, oldest first, each with its step.
        held_out: losses by name and noise level, by step.
        validations: folders with pictures, by step.
    """

    logged: list[dict[str, float]]
    held_out: dict[int, dict[str, list[float]]]
    validations: dict[int, Path]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """Return a logged curve as (step, value)."""
        return [(int(each[STEP]), each[name]) for each in self.logged if name in each]


def append(output_dir: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line to the log; values that are no numbers are left out."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    with (output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({STEP: step} | finite) + "\n")


def forget_after(output_dir: Path, step: int) -> None:
    """Take out of the log what is of later steps than a run goes on from."""
    kept = [json.dumps(line) + "\n" for line in _read_log(output_dir) if line[STEP] <= step]
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / LOG_FILE, "".join(kept))


def read(output_dir: Path, last_step: int) -> Records:
    """Return what a run wrote up to a step; earlier runs may have left later validations."""
    folders = {
        int(path.name.removeprefix("step-")): path
        for path in sorted((output_dir / "validation").glob("step-*"))
        if path.name.removeprefix("step-").isdecimal()
    }
    folders = {step: path for step, path in folders.items() if step <= last_step}
    held_out = {
        step: json.loads((path / "held_out.json").read_text())
        for step, path in folders.items()
        if (path / "held_out.json").is_file()
    }
    logged = [line for line in _read_log(output_dir) if line[STEP] <= last_step]
    return Records(logged, held_out, folders)


def _read_log(output_dir: Path) -> list[dict[str, float]]:
    """Return the lines of the log; one that was cut by the end of a process is left out."""
    path = output_dir / LOG_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and STEP in values:
            lines.append(values)
    return lines
