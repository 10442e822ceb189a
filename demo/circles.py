"""`python -m demo.circles`: data sets in fill50k's very layout and style, drawn from a seed.

Each row is a circle: its thin white outline on black is the conditioning image, the filled disc on
a plain background the image, "<colour> circle with <colour> background" the caption. Two data sets:
`train`, and `unseen`, other circles in pairs of colours that `train` never shows.
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

from common.atomic_files import write_text
from common.command import stage_command
from common.errors import ConfigError
from common.options import option
from demo.colors import COLORS, is_held_out

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


@dataclass(frozen=True)
class CirclesConfig:
    """Draw circles in fill50k's layout, `train` and `unseen`, unless just these are there."""

    output_dir: Path = option(help="Where the two data sets go.")
    num_rows: int = option(3072, help="Circles to train on.")
    num_unseen: int = option(100, help="Circles to score on, in pairs of colours kept from train.")
    seed: int = option(0, help="Of the circles.")

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ConfigError: naming the option.
        """
        for flag, count in (("--num-rows", self.num_rows), ("--num-unseen", self.num_unseen)):
            if count < 1:
                raise ConfigError(f"{flag} {count}: at least 1.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: at least 0.")


def random_circles(num_rows: int, seed: int, held_out: bool | None = None) -> list[Circle]:
    """Return random circles that lie inside the picture; two different colours each.

    Args:
        num_rows: how many.
        seed: of the draw.
        held_out: whether the pairs of colours are those kept from training; None is any pair.
    """
    rng = np.random.default_rng(seed)
    names = list(COLORS)
    rows = []
    for _ in range(num_rows):
        radius = int(rng.integers(*RADIUS_PX, endpoint=True))
        x, y = (int(value) for value in rng.integers(radius, IMAGE_PX - radius, size=2))
        color, background = (names[k] for k in rng.choice(len(names), size=2))
        while COLORS[color] == COLORS[background] or (
            held_out is not None and is_held_out(color, background) != held_out
        ):
            # Both anew where a tenth of the pairs is wanted: a colour may have no such partner.
            if held_out is not None:
                color = names[rng.integers(len(names))]
            background = names[rng.integers(len(names))]
        rows.append(Circle(x, y, radius, color, background))
    return rows


def draw_outline(circle: Circle) -> Image.Image:
    """Return the conditioning image: a thin white outline on black."""
    return _draw(circle, "black", outline="white", width=LINE_PX * SUPERSAMPLING)


def draw_disc(circle: Circle) -> Image.Image:
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
    draw_outline(circle).save(folder / "source" / f"{index}.png", compress_level=1)
    draw_disc(circle).save(folder / "target" / f"{index}.png", compress_level=1)


def write_circles(folder: Path, rows: list[Circle]) -> None:
    """Draw a data set into a folder; `prompt.json` comes last, so that its presence means whole."""
    (folder / "prompt.json").unlink(missing_ok=True)
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        drawn = pool.map(partial(_save, folder), range(len(rows)), rows, chunksize=32)
        for _ in tqdm(drawn, total=len(rows), unit="pair", desc="circles", disable=None):
            pass
    write_text(folder / "prompt.json", format_prompt_json(rows))


def format_prompt_json(rows: list[Circle]) -> str:
    """Return the text of fill50k's prompt.json for rows."""
    return "".join(
        json.dumps({"source": f"source/{k}.png", "target": f"target/{k}.png", "prompt": row.prompt})
        + "\n"
        for k, row in enumerate(rows)
    )


def unseen_circles(config: CirclesConfig) -> list[Circle]:
    """Return the circles to score on: at other places than those of the same seed's `train`."""
    return random_circles(config.num_unseen, config.seed + 1, held_out=True)


def unseen_image_path(config: CirclesConfig, number: int) -> Path:
    """Return where the conditioning image of an unseen circle is."""
    return config.output_dir / "unseen" / "source" / f"{number}.png"


def draw_data_sets(config: CirclesConfig) -> None:
    """Draw `train` and `unseen`, unless just these are there.

    Raises:
        OSError: the output cannot be written.
    """
    for name, rows in (
        ("train", random_circles(config.num_rows, config.seed, held_out=False)),
        ("unseen", unseen_circles(config)),
    ):
        folder = config.output_dir / name
        present = folder / "prompt.json"
        if present.is_file() and present.read_text() == format_prompt_json(rows):
            click.echo(f"{folder}: the {len(rows)} circles are there already")
        else:
            write_circles(folder, rows)
            click.echo(f"{folder}: {len(rows)} circles drawn")


main = stage_command("circles", CirclesConfig, draw_data_sets, section="circles")

if __name__ == "__main__":
    main(prog_name="python -m demo.circles")
