"""`python -m demo.circles`: data sets in fill50k's layout and style, drawn from a seed.

Each row is a circle. The conditioning image is its thin white outline on black, the image is the
filled disc on a plain background, the caption "<colour> circle with <colour> background". The two
data sets are `train`, and `unseen`: other circles in pairs of colours that `train` never shows.
"""

import json
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
from common.memory.processes import num_cores
from common.options import option
from demo.colors import COLORS, is_held_out

IMAGE_PX = 512
LINE_PX = 3
RADIUS_PX = (40, 200)
LEAST_PX = 64  # smaller ones have circles of a few pixels
SUPERSAMPLING = 2
WHITE = 255


@dataclass(frozen=True)
class Circle:
    """One row: where the circle is, in pixels of an image of `IMAGE_PX`, and its colours' names."""

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
    """Draw circles in fill50k's layout, `train` and `unseen`, unless they are there already."""

    output_dir: Path = option(help="Folder of the two data sets.", heading="Circles")
    num_rows: int = option(3072, help="Number of circles to train on.")
    num_unseen: int = option(
        100, help="Number of circles to score on, in pairs of colours that train never shows."
    )
    image_px: int = option(IMAGE_PX, help="Side of the images in pixels; fill50k's is 512.")
    seed: int = option(0, help="Seed of the circles.")

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ConfigError: a number is too small; the message names the option.
        """
        for flag, count in (("--num-rows", self.num_rows), ("--num-unseen", self.num_unseen)):
            if count < 1:
                raise ConfigError(f"{flag} {count}: at least 1.")
        if self.image_px < LEAST_PX:
            raise ConfigError(f"--image-px {self.image_px}: at least {LEAST_PX}.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed}: at least 0.")


def random_circles(num_rows: int, seed: int, held_out: bool | None = None) -> list[Circle]:
    """Return random circles that lie inside the picture, each with two different colours.

    Args:
        num_rows: how many.
        seed: of the circles.
        held_out: True for the pairs of colours kept from training, False for the others, None for
            any pair.
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
            # Draw both colours again, because a colour may have no held-out pair at all.
            if held_out is not None:
                color = names[rng.integers(len(names))]
            background = names[rng.integers(len(names))]
        rows.append(Circle(x, y, radius, color, background))
    return rows


def draw_outline(circle: Circle, image_px: int = IMAGE_PX) -> Image.Image:
    """Return the conditioning image, a thin white outline on black, with sides of `image_px`."""
    line = round(LINE_PX * SUPERSAMPLING * image_px / IMAGE_PX)
    coverage = _draw_ellipse(circle, image_px, outline=WHITE, width=line)
    return Image.merge("RGB", [coverage] * 3)


def draw_disc(circle: Circle, image_px: int = IMAGE_PX) -> Image.Image:
    """Return the image, the filled disc on its background, with sides of `image_px`."""
    coverage = _draw_ellipse(circle, image_px, fill=WHITE)
    channels = zip(COLORS[circle.color], COLORS[circle.background], strict=True)
    return Image.merge("RGB", [coverage.point(_blends(*pair)) for pair in channels])


def _draw_ellipse(circle: Circle, image_px: int, **style: int) -> Image.Image:
    """Return how much of each pixel an ellipse covers, 0 to 255."""
    scale = SUPERSAMPLING * image_px / IMAGE_PX
    side = SUPERSAMPLING * image_px
    box = [
        round((circle.x - circle.radius) * scale),
        round((circle.y - circle.radius) * scale),
        round((circle.x + circle.radius) * scale),
        round((circle.y + circle.radius) * scale),
    ]
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse(box, **style)
    return image.reduce(SUPERSAMPLING)


def _blends(color: int, background: int) -> list[int]:
    """Return the value of a channel for each coverage; only those of whole samples occur."""
    samples = SUPERSAMPLING**2
    blends = [0] * (WHITE + 1)
    for covered in range(samples + 1):
        coverage = (covered * WHITE + samples // 2) // samples  # as `reduce` rounds
        mixed = covered * color + (samples - covered) * background
        blends[coverage] = (mixed + samples // 2) // samples
    return blends


def _save_images(folder: Path, image_px: int, index: int, circle: Circle) -> None:
    draw_outline(circle, image_px).save(folder / "source" / f"{index}.png", compress_level=1)
    draw_disc(circle, image_px).save(folder / "target" / f"{index}.png", compress_level=1)


def write_circles(folder: Path, rows: list[Circle], image_px: int = IMAGE_PX) -> None:
    """Draw a data set into a folder; `prompt.json` is written last, when all images are there."""
    (folder / "prompt.json").unlink(missing_ok=True)
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save = partial(_save_images, folder, image_px)
    with ProcessPoolExecutor(min(num_cores(), 8)) as pool:
        drawn = pool.map(save, range(len(rows)), rows, chunksize=32)
        for _ in tqdm(drawn, total=len(rows), unit="pair", desc="circles", disable=None):
            pass
    write_text(folder / "prompt.json", format_prompt_json(rows))


def format_prompt_json(rows: list[Circle]) -> str:
    """Return the text of fill50k's prompt.json for some rows."""
    return "".join(
        json.dumps({"source": f"source/{k}.png", "target": f"target/{k}.png", "prompt": row.prompt})
        + "\n"
        for k, row in enumerate(rows)
    )


def unseen_circles(config: CirclesConfig) -> list[Circle]:
    """Return the circles to score on, drawn from another seed than those of `train`."""
    return random_circles(config.num_unseen, config.seed + 1, held_out=True)


def draw_data_sets(config: CirclesConfig) -> None:
    """Draw `train` and `unseen`, unless they are there already.

    Raises:
        OSError: the output cannot be written.
    """
    for name, rows in (
        ("train", random_circles(config.num_rows, config.seed, held_out=False)),
        ("unseen", unseen_circles(config)),
    ):
        folder = config.output_dir / name
        if _are_drawn(folder, rows, config.image_px):
            click.echo(f"{folder}: the {len(rows)} circles are there already")
        else:
            write_circles(folder, rows, config.image_px)
            click.echo(f"{folder}: {len(rows)} circles drawn")


def _are_drawn(folder: Path, rows: list[Circle], image_px: int) -> bool:
    """Return whether a folder holds these circles, in this size."""
    prompts = folder / "prompt.json"
    if not prompts.is_file() or prompts.read_text() != format_prompt_json(rows):
        return False
    with Image.open(folder / "source" / "0.png") as image:
        return image.size == (image_px, image_px)


main = stage_command("circles", CirclesConfig, draw_data_sets, section="circles")

if __name__ == "__main__":
    main(prog_name="python -m demo.circles")
