"""`python -m demo.photographs`: thirty photographs with captions, to try one's own data with.

They are parts of the pictures that scikit-image brings with it, which nothing has to download. Each
`NAME.png` has its caption in `NAME.txt`, as trainers of LoRAs keep them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from PIL import Image

from common.atomic_files import write_text
from common.command import stage_command
from common.errors import ConfigError
from common.options import option

# A picture of scikit-image's package by the name of its function, and its caption.
CAPTIONS = {
    "astronaut": "a portrait of an astronaut in an orange suit",
    "brick": "a brick wall, black and white",
    "camera": "a man behind a camera on a tripod, black and white",
    "chelsea": "the face of a tabby cat",
    "coffee": "a cup of coffee on a wooden table",
    "coins": "old coins on a dark ground, black and white",
    "grass": "grass from above, black and white",
    "gravel": "gravel, black and white",
    "hubble_deep_field": "galaxies in front of a black sky",
    "immunohistochemistry": "tissue under a microscope, stained brown and blue",
    "moon": "the surface of the moon, black and white",
    "retina": "the retina of an eye",
    "rocket": "a rocket on its launch pad at night",
    "stereo_motorcycle": "a red motorcycle in a workshop",
    "text": "a page of hand-written text, black and white",
}
PARTS = ("left", "right")


@dataclass(frozen=True)
class PhotographsConfig:
    """Write thirty photographs with captions into a new or empty folder."""

    output_dir: Path = option(help="Folder of the photographs.", heading="Photographs")

    def __post_init__(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ConfigError: naming the folder.
        """
        if self.output_dir.exists() and (
            not self.output_dir.is_dir() or any(self.output_dir.iterdir())
        ):
            raise ConfigError(f"--output-dir {self.output_dir}: give a new or an empty folder.")


def photographs() -> Iterator[tuple[str, Image.Image, str]]:
    """Yield name, picture and caption of each photograph: both halves of scikit-image's."""
    import skimage.data

    for name, caption in CAPTIONS.items():
        found = getattr(skimage.data, name)()
        picture = Image.fromarray(found[0] if isinstance(found, tuple) else found)
        half = picture.width // 2
        for number, part in enumerate(PARTS):
            box = (number * half, 0, (number + 1) * half, picture.height)
            yield f"{name}-{part}", picture.crop(box), f"{caption}, {part} half"


def write_photographs(config: PhotographsConfig) -> None:
    """Write the photographs and their captions.

    Raises:
        OSError: they cannot be written.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, picture, caption in photographs():
        picture.save(config.output_dir / f"{name}.png")
        write_text(config.output_dir / f"{name}.txt", f"{caption}\n")
        count += 1
    click.echo(f"{config.output_dir}: {count} photographs with captions written")


main = stage_command("photographs", PhotographsConfig, write_photographs, section="photographs")

if __name__ == "__main__":
    main(prog_name="python -m demo.photographs")
