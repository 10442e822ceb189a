"""Files in a cache that nobody needs any more: surplus shards, and what killed workers left."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

from precompute.encoding.drawn_controls import SUFFIX
from precompute.planning.plan import ProductPlan

SHARD_FILE = re.compile(r"(?P<shard>\d{6,9})\.(tar|json|drawn\.zip)(?P<temporary>\.tmp-[0-9a-f]+)?")
TEMPORARY_FILE = re.compile(r"[a-z.]+\.tmp-[0-9a-f]+")
# A shard is written in minutes, and its file's time moves on all the while.
ABANDONED_AFTER_S = 3600


def surplus_files(product: ProductPlan) -> Iterator[Path]:
    """Yield a product's shards beyond the plan, drawn images, and abandoned temporary files.

    All its shards are there.
    """
    for path in sorted(product.folder.glob("*")):
        name = SHARD_FILE.fullmatch(path.name)
        if name is None:
            continue
        if name["temporary"]:
            if _is_abandoned(path):
                yield path
        elif int(name["shard"]) >= product.num_shards or path.name.endswith(SUFFIX):
            yield path


def abandoned_files(cache: Path) -> list[Path]:
    """Return the half-written files of killed workers beside the products: digests, plans."""
    return [
        path
        for path in cache.glob("*.tmp-*")
        if TEMPORARY_FILE.fullmatch(path.name) and _is_abandoned(path)
    ]


def _is_abandoned(temporary: Path) -> bool:
    """Tell whether nobody writes to a temporary file any more."""
    try:
        return time.time() - temporary.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:  # another worker has just finished it
        return False
