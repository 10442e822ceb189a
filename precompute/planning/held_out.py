"""Rows held out of training, for a loss on what the ControlNet has not seen."""

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from common.errors import ConfigError
from precompute.planning.inventory import Inventory

# The digest of a held-out image is the digest of the image with these bits flipped. So a row that
# becomes held out, or ceases to be, is another item and moves to another shard.
HELD_OUT = np.frombuffer(xxh3_128_digest(b"held out"), ">u8").astype(np.uint64)


def held_out_rows(inventory: Inventory, num_wanted: int, seed: int) -> NDArray[np.bool_]:
    """Return which rows are held out, [N].

    The choice depends on the images, not on the rows' order: rows with the same image are held out
    together (so there may be more than wanted), and added or removed rows hardly change it.

    Args:
        inventory: of all rows.
        num_wanted: how many rows to hold out.
        seed: of the choice.

    Raises:
        ConfigError: no row would be left to train on.
    """
    held_out = np.zeros(len(inventory), bool)
    if not num_wanted:
        return held_out
    usable = np.ones(len(inventory), bool)
    usable[list(inventory.faults)] = False
    random_ranks = inventory.images[:, 0] ^ np.uint64(xxh3_64_intdigest(b"held out", seed=seed))
    drawn = np.sort(random_ranks[usable])[:num_wanted]
    if len(drawn) == num_wanted:
        held_out = usable & (random_ranks <= drawn[-1])
    if len(drawn) < num_wanted or held_out.sum() == usable.sum():
        raise ConfigError(
            f"--validation-rows {num_wanted}: the source has {usable.sum()} usable rows, and some "
            "must be left to train on."
        )
    return held_out
