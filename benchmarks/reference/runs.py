"""Data, command lines and results for runs of diffusers' train_controlnet_sd3.py and of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.atomic_files import write_text
from common.options import flag
from demo.circles import random_circles, write_circles

# Standard deviation of the noise on the pictures. In flat ones the GroupNorm of a VAE with random
# weights would divide by nearly zero.
GRAIN = 40


def write_data(folder: Path, num_rows: int, seed: int) -> None:
    """Write pictures of circles, with noise on them, as an image folder that both programs read."""
    rows = random_circles(num_rows, seed)
    write_circles(folder, rows)
    (folder / "prompt.json").unlink()
    rng = np.random.default_rng(seed)
    for path in sorted(folder.glob("*/*.png")):
        pixels = np.array(Image.open(path))
        grain = rng.normal(0, GRAIN, pixels.shape)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path)
    lines = [
        {
            "file_name": f"target/{number}.png",
            "conditioning_image_file_name": f"source/{number}.png",
            "text": row.prompt,
        }
        for number, row in enumerate(rows)
    ]
    write_text(folder / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def flags(**settings: Any) -> list[str]:
    """Return settings as a command line of ours; a setting that is True becomes a bare flag."""
    return [
        part
        for name, value in settings.items()
        for part in (flag(name), *([] if value is True else [str(value)]))
    ]


def reference_flags(**settings: Any) -> list[str]:
    """Return settings as the reference's command line, whose options have underscores."""
    return [
        "--" + part[2:].replace("-", "_") if part.startswith("--") else part
        for part in flags(**settings)
    ]


def logged_losses(output_dir: Path) -> list[float]:
    """Return the losses that a training run of ours logged, step by step."""
    events = EventAccumulator(str(output_dir / "logs" / "train_controlnet")).Reload()
    return [event.value for event in events.Scalars("loss")]


def run_python(*arguments: object) -> None:
    """Run Python with these arguments, offline.

    Raises:
        RuntimeError: the process failed; the message has the end of its output.
    """
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    click.echo(f"python {' '.join(map(str, arguments[:4]))} …")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:5])} failed:\n{(done.stdout + done.stderr)[-3000:]}"
        )
