"""Copies of a data set with its lines changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path


def rows(source: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (source / "prompt.json").read_text().splitlines()]


def copy_of(source: Path, folder: Path, edit: Callable[[list[dict[str, object]]], None]) -> Path:
    shutil.copytree(source, folder)
    lines = [dict(row) for row in rows(source)]
    edit(lines)
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, lines)))
    return folder
