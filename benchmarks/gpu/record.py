"""Which steps of `make gpu` are done, so that a run that was cut goes on where it was."""

import json
import shutil
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from common.atomic_files import write_text
from common.provenance import commit, machine, versions

# What a step's outcome depends on. Not the commit alone: it says nothing of files that differ from
# it, and the tables that are written at the end would change it.
SOURCES = ("**/*.py", "configs/**/*.toml", "demo/miniature/**/*.json", "constraints.txt")
REPOSITORY = Path(__file__).parents[2]


class Record:
    """The steps that are done, in `results/run.json`.

    Results and logs of another code, machine, size or other libraries are deleted first.

    Args:
        folder: folder of results and logs.
        size: `full` or `tiny`.
    """

    def __init__(self, folder: Path, size: str) -> None:
        self._path = folder / "results/run.json"
        self._key = {
            "code": digest(REPOSITORY),
            "machine": machine(),
            "size": size,
            "versions": versions(),
        }
        self._seconds: dict[str, float] = {}
        found = read_json(self._path)
        if found is not None and found.get("key") == self._key:
            self._seconds = found["seconds"]
            return
        for name in ("results", "logs"):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
        self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each step that is done."""
        return dict(self._seconds)

    def add(self, name: str, seconds: float) -> None:
        """Note that a step is done."""
        self._seconds[name] = seconds
        self._write()

    def _write(self) -> None:
        content = {"key": self._key, "commit": commit(), "seconds": self._seconds}
        write_text(self._path, json.dumps(content, indent=1) + "\n")


def digest(folder: Path) -> str:
    """Return a digest of the files in a checkout that `SOURCES` names."""
    found = xxh3_128()
    for pattern in SOURCES:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder)
            if name.parts[0] not in (".venv", "runs"):
                found.update(f"{name} {path.stat().st_size} ".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
