"""Contact sheets: pictures side by side in rows, with headings and captions."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from common.atomic_files import atomic_file

MARGIN_PX = 8
TEXT_PX = 14
CELL_PX = 256


def contact_sheet(
    rows: Sequence[tuple[Sequence[Image.Image], str]], headings: Sequence[str]
) -> Image.Image:
    """Return one image with all pictures in rows, and a line of text under each row.

    Args:
        rows: (pictures, caption); each row has as many pictures as there are headings.
        headings: one above each column.
    """
    font = ImageFont.load_default(TEXT_PX)
    column = CELL_PX + MARGIN_PX
    line = TEXT_PX + MARGIN_PX
    row_height = CELL_PX + line + MARGIN_PX
    size = (MARGIN_PX + column * len(headings), line + MARGIN_PX + row_height * len(rows))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, heading in enumerate(headings):
        pen.text((MARGIN_PX + number * column, MARGIN_PX), heading, "black", font)
    for index, (pictures, caption) in enumerate(rows):
        top = line + MARGIN_PX + index * row_height
        for number, picture in enumerate(pictures):
            cell = ImageOps.pad(
                picture.convert("RGB"), (CELL_PX, CELL_PX), Image.Resampling.LANCZOS, "white"
            )
            sheet.paste(cell, (MARGIN_PX + number * column, top))
        shown = " ".join(caption[:1000].split())[:300]  # no more than a line holds
        while shown and pen.textlength(shown, font) > size[0] - 2 * MARGIN_PX:
            shown = shown.removesuffix("…")[:-1] + "…"
        pen.text((MARGIN_PX, top + CELL_PX + MARGIN_PX // 2), shown, "black", font)
    return sheet


def thumbnail(path: Path) -> Image.Image:
    """Return a picture, scaled down to a cell of the sheet."""
    with Image.open(path) as image:
        return ImageOps.contain(image.convert("RGB"), (CELL_PX, CELL_PX), Image.Resampling.LANCZOS)


def save_png(path: Path, picture: Image.Image, info: PngInfo | None = None) -> None:
    """Save a picture and its metadata, completely or not at all."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG", pnginfo=info)
