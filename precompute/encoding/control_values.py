"""Whether conditioning images use their range: blank ones, and maps that are nearly black."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from precompute.planning.context import Context
from precompute.sources.counted import Counted
from precompute.sources.patient_read import read_patiently
from precompute.sources.source import Kind
from sd3 import images
from sd3.image_files import BadImage
from sd3.value_scale import AS_IS, LARGEST_8_BIT, Values, values_of

# Looked at before a run begins, spread evenly; the others when they are encoded.
ROWS_LOOKED_AT = 100
THREADS = 4


@dataclass
class Slivers:
    """Conditioning images of one format that use a small part of its range, and which part."""

    rows: Counted[int] = field(default_factory=Counted)
    low: float = float("inf")
    high: float = float("-inf")


class ControlValues:
    """The conditioning images that are of one colour, or nearly; threads may add to it.

    Attributes:
        num_rows: rows looked at.
        blank: those of one colour.
        slivers: those that use a small part of their range, by the highest number of their format.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.blank = Counted[int]()
        self.slivers: dict[float, Slivers] = {}
        self._lock = threading.Lock()

    def add(self, row: int, values: Values) -> None:
        """Count a row."""
        with self._lock:
            self.num_rows += 1
            if values.is_one_colour:
                self.blank.add([row])
            elif values.is_sliver:
                found = self.slivers.setdefault(values.full, Slivers())
                found.rows.add([row])
                found.low, found.high = min(found.low, values.low), max(found.high, values.high)

    def describe_unseen(self, context: Context) -> list[str]:
        """Return what `describe` does, if it is more than `look_at_controls` could see."""
        seen = context.annotator is None and self.num_rows <= ROWS_LOOKED_AT
        return [] if seen else self.describe(context)

    def describe(self, context: Context) -> list[str]:
        """Return a line for each kind of image that was found."""
        drawn = context.annotator is not None
        kind: Kind = "image" if drawn else "conditioning_image"
        scale = context.config.conditioning_scale

        def name_of(row: int) -> str:
            return context.file_name(row, kind)

        lines = []
        if self.blank.count:
            cause = "" if drawn else "; transparent ones may be drawn in --background's own colour"
            lines.append(
                f"{self.blank.count} conditioning images are of one colour: "
                f"{self.blank.named(name_of)}{cause}"
            )
        for full, found in sorted(self.slivers.items()):
            low, high = (int(number * 256 / (full + 1)) for number in (found.low, found.high))
            eighths = "" if full == LARGEST_8_BIT else f", which become {low} to {high} of 255"
            way_out = (
                f"; --conditioning-scale {found.low:g}:{found.high:g} makes these black to white, "
                "and auto each image's own"
            )
            lines.append(
                f"{found.rows.count} conditioning images use little of their range, "
                f"{found.low:g} to {found.high:g} of {full:g}{eighths}: {found.rows.named(name_of)}"
                f"{'' if drawn or scale != AS_IS else way_out}"
            )
        return lines


def look_at_controls(context: Context) -> list[str]:
    """Return what is odd about the source's conditioning images; of many, about some of them."""
    inventory, config = context.inventory, context.config
    if context.annotator is not None or not context.shards_to_build(context.products.conditioning):
        return []
    step = -(-len(inventory) // ROWS_LOOKED_AT)
    rows = [row for row in range(0, len(inventory), step) if row not in context.bad_rows.rows]
    values = ControlValues()

    def look(row: int) -> None:
        # What fails is found again, and named, when it is encoded.
        with contextlib.suppress(OSError, BadImage):
            data = read_patiently(context.source, int(inventory.rows[row]), "conditioning_image")
            numbers = images.conditioning_numbers(data, config.background)
            values.add(row, used_values(numbers, config.conditioning_scale))

    with ThreadPoolExecutor(THREADS, "look") as threads:
        list(threads.map(look, rows))
    of = f"of {len(rows)} looked at, " if step > 1 else ""
    return [f"{of}{line}" for line in values.describe(context)]


def used_values(numbers: Image.Image, scale: str) -> Values:
    """Return the numbers that an image uses: as it is its own, otherwise those at the scale."""
    return values_of(numbers if scale == AS_IS else images.at_scale(numbers, scale))
