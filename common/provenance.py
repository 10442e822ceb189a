"""`run.json`: the settings, versions and inputs with which a stage made its output."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from common.atomic_files import write_text
from common.memory.processes import num_cores
from common.options import as_dict

RUN = "run.json"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that affect results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str | None:
    """Return the commit of this project's checkout, with `+` if files differ from it, or None."""
    here = Path(__file__).resolve().parent
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def machine() -> str:
    """Return the name of the GPU, or the number of CPU cores."""
    import torch  # only here: `python -m shards` does without

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{num_cores()} CPU cores"


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in a folder's `run.json`, or nothing if they cannot be read."""
    try:
        settings: dict[str, Any] = json.loads((folder / RUN).read_text("utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return {}
    return settings


def write_run(folder: Path, stage: str, config: Any, **more: Any) -> None:
    """Write `run.json` into a stage's output folder.

    Args:
        folder: the output folder, which exists.
        stage: `precompute`, `train`, `infer` or `score`.
        config: the stage's config dataclass.
        more: further plain JSON values, e.g. fingerprints.
    """
    run = {
        "stage": stage,
        "config": as_dict(config),
        "versions": versions(),
        "commit": commit(),
        **more,
    }
    write_text(folder / RUN, json.dumps(run, ensure_ascii=False, indent=1) + "\n")
