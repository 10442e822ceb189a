"""Which view of which row each latent is of.

A view is the centre crop of a row's picture, a random crop, or the mirror of one of them.

Axes: N rows, V views.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Views:
    """The views of all rows, row by row; an item of the latents is the view of its number.

    Attributes:
        rows: the inventory's row of each view, [V].
        crops: number of each view's crop, [V]; 0 is the centre crop.
        mirrored: which views are mirrors, [V].
    """

    rows: NDArray[np.int64]
    crops: NDArray[np.int32]
    mirrored: NDArray[np.bool_]

    def __len__(self) -> int:
        """Return V."""
        return len(self.rows)

    @cached_property
    def is_first(self) -> NDArray[np.bool_]:
        """Which views are the first of their rows, [V]: the centre crops, unmirrored."""
        is_centre: NDArray[np.bool_] = self.crops == 0
        return is_centre & ~self.mirrored


def list_views(held_out: NDArray[np.bool_], num_crops: int, *, mirrored: bool) -> Views:
    """Return the views of all rows.

    Args:
        held_out: which rows are held out of training, [N]; of these the centre crop alone is kept,
            so that the held-out loss measures the same with any number of crops.
        num_crops: of every other row.
        mirrored: whether each crop is followed by its mirror.
    """
    each = 2 if mirrored else 1
    counts = each * np.where(held_out, 1, num_crops)
    rows = np.repeat(np.arange(len(held_out)), counts)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Views(rows, (numbers // each).astype(np.int32), numbers % each == 1)
