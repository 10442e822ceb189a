"""The CSS colour names, with spaces between their words as in fill50k's captions."""

import hashlib

from PIL import ImageColor

# The names of two or more words; all others are one word.
_SPACED = """
alice blue, antique white, blanched almond, blue violet, burly wood, cadet blue, cornflower blue,
dark blue, dark cyan, dark golden rod, dark gray, dark green, dark khaki, dark magenta,
dark olive green, dark orange, dark orchid, dark red, dark salmon, dark sea green, dark slate blue,
dark slate gray, dark turquoise, dark violet, deep pink, deep sky blue, dim gray, dodger blue,
fire brick, floral white, forest green, ghost white, golden rod, green yellow, honey dew, hot pink,
indian red, lavender blush, lawn green, lemon chiffon, light blue, light coral, light cyan,
light golden rod yellow, light gray, light green, light pink, light salmon, light sea green,
light sky blue, light slate gray, light steel blue, light yellow, lime green, medium aqua marine,
medium blue, medium orchid, medium purple, medium sea green, medium slate blue,
medium spring green, medium turquoise, medium violet red, midnight blue, mint cream, misty rose,
navajo white, old lace, olive drab, orange red, pale golden rod, pale green, pale turquoise,
pale violet red, papaya whip, peach puff, powder blue, rebecca purple, rosy brown, royal blue,
saddle brown, sandy brown, sea green, sea shell, sky blue, slate blue, slate gray, spring green,
steel blue, white smoke, yellow green
"""


def _css_colors() -> dict[str, tuple[int, int, int]]:
    spaced = {name.replace(" ", ""): name for name in " ".join(_SPACED.split()).split(", ")}
    colors: dict[str, tuple[int, int, int]] = {}
    for css in sorted(ImageColor.colormap):
        if "grey" in css:
            continue  # a second spelling of gray
        red, green, blue = ImageColor.getrgb(css)[:3]
        colors[spaced.get(css, css)] = (red, green, blue)
    return colors


def is_held_out(color: str, background: str) -> bool:
    """Tell whether a pair of colour names is kept from training; one pair in ten is."""
    return hashlib.sha256(f"{color}/{background}".encode()).digest()[0] * 10 < 256


COLORS = _css_colors()
"""Name -> sRGB, 0 to 255. 141 names for 139 colours: aqua is cyan, fuchsia is magenta."""
