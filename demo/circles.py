"""`python -m demo.circles`: a data set in fill50k's very layout and style, drawn from a seed.

Each row is a circle: its thin white outline on black is the conditioning image, the filled disc on
a plain background the image, "<colour> circle with <colour> background" the caption.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from demo.colors import COLORS
from shards.options import CONTEXT
from shards.writer import write_text

IMAGE_PX = 512
LINE_PX = 3
RADIUS_PX = (40, 200)
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Circle:
    """One row: where the circle is, in pixels, and its two colour names."""

    x: int
    y: int
    radius: int
    color: str
    background: str

    @property
    def prompt(self) -> str:
        """The caption."""
        return f"{self.color} circle with {self.background} background"


def circles(num_rows: int, seed: int) -> list[Circle]:
    """Return random circles that lie inside the picture; two different colours each."""
    rng = np.random.default_rng(seed)
    names = list(COLORS)
    rows = []
    for _ in range(num_rows):
        radius = int(rng.integers(*RADIUS_PX, endpoint=True))
        x, y = (int(value) for value in rng.integers(radius, IMAGE_PX - radius, size=2))
        color, background = rng.choice(len(names), size=2)
        while COLORS[names[color]] == COLORS[names[background]]:
            background = rng.integers(len(names))
        rows.append(Circle(x, y, radius, names[color], names[background]))
    return rows


def outline(circle: Circle) -> Image.Image:
    """Return the conditioning image: a thin white outline on black."""
    return _draw(circle, "black", outline="white", width=LINE_PX * SUPERSAMPLING)


def disc(circle: Circle) -> Image.Image:
    """Return the image: the filled disc on its background."""
    return _draw(circle, COLORS[circle.background], fill=COLORS[circle.color])


def _draw(circle: Circle, background: str | tuple[int, int, int], **style: object) -> Image.Image:
    side = IMAGE_PX * SUPERSAMPLING
    image = Image.new("RGB", (side, side), background)
    box = [
        (circle.x - circle.radius) * SUPERSAMPLING,
        (circle.y - circle.radius) * SUPERSAMPLING,
        (circle.x + circle.radius) * SUPERSAMPLING,
        (circle.y + circle.radius) * SUPERSAMPLING,
    ]
    ImageDraw.Draw(image).ellipse(box, **style)  # type: ignore[arg-type]  # fill, outline, width
    return image.reduce(SUPERSAMPLING)


def _save(folder: Path, index: int, circle: Circle) -> None:
    outline(circle).save(folder / "source" / f"{index}.png", compress_level=1)
    disc(circle).save(folder / "target" / f"{index}.png", compress_level=1)


def write_circles(folder: Path, num_rows: int, seed: int) -> None:
    """Draw a data set into a folder; `prompt.json` comes last, so that its presence means whole."""
    rows = circles(num_rows, seed)
    (folder / "prompt.json").unlink(missing_ok=True)
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        drawn = pool.map(partial(_save, folder), range(num_rows), rows, chunksize=32)
        for _ in tqdm(drawn, total=num_rows, unit="pair", desc="circles", disable=None):
            pass
    write_text(folder / "prompt.json", prompt_json(rows))


def prompt_json(rows: list[Circle]) -> str:
    """Return the text of fill50k's prompt.json for rows."""
    return "".join(
        json.dumps({"source": f"source/{k}.png", "target": f"target/{k}.png", "prompt": row.prompt})
        + "\n"
        for k, row in enumerate(rows)
    )


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--num-rows", default=1024, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(output_dir: Path, num_rows: int, seed: int) -> None:
    """Draw NUM_ROWS circles in fill50k's layout, unless just these are there already."""
    present = output_dir / "prompt.json"
    if present.is_file() and present.read_text() == prompt_json(circles(num_rows, seed)):
        click.echo(f"{output_dir}: the {num_rows} circles are there already")
        return
    write_circles(output_dir, num_rows, seed)
    click.echo(f"{output_dir}: {num_rows} circles drawn")


if __name__ == "__main__":
    main(prog_name="python -m demo.circles")
