"""Rows held out of training, for a loss on what the ControlNet has not seen."""

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from common.errors import ConfigError
from precompute.planning.inventory import Inventory

# The digest of a held-out image is its own with these bits turned, so that a row which joins them,
# or leaves them, is another item and moves.
HELD_OUT = np.frombuffer(xxh3_128_digest(b"held out"), ">u8").astype(np.uint64)


def held_out_rows(inventory: Inventory, wanted: int, seed: int) -> NDArray[np.bool_]:
    """Return which rows are held out, [N].

    The choice goes by images, not by places: rows of one image are held out together (so there may
    be more than wanted), and rows that come and go leave it as it is but for one in so many.

    Args:
        inventory: of all rows.
        wanted: how many.
        seed: of the choice.

    Raises:
        ConfigError: there would be none left to train on.
    """
    found = np.zeros(len(inventory), bool)
    if not wanted:
        return found
    usable = np.ones(len(inventory), bool)
    usable[list(inventory.faults)] = False
    lots = inventory.images[:, 0] ^ np.uint64(xxh3_64_intdigest(b"held out", seed=seed))
    drawn = np.sort(lots[usable])[:wanted]
    if len(drawn) == wanted:
        found = usable & (lots <= drawn[-1])
    if len(drawn) < wanted or found.sum() == usable.sum():
        raise ConfigError(
            f"--validation-rows {wanted}: the source has {usable.sum()} usable rows, and some must "
            "be left to train on."
        )
    return found
