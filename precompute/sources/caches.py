"""What lies in the folder of a cache, so that no cache is taken for a part of a data set."""

from collections.abc import Iterable

from common.provenance import RUN
from shards.format.expected_cache import PLAN
from shards.format.manifest import MANIFEST, PREVIOUS, SAMPLES
from shards.format.published.dataset_card import CARD

HASHES = "hashes.npy"
PRODUCTS = {"text", "latents", "conditioning", "validation"}
CACHE_FILES = PRODUCTS | {RUN, CARD, MANIFEST, PREVIOUS, SAMPLES, PLAN, HASHES, f"{HASHES}.lock"}


def not_of_a_cache(names: Iterable[str]) -> list[str]:
    """Return those names in a folder that no cache has, sorted. Half-written files are its own."""
    return sorted(name for name in names if name.split(".tmp-")[0] not in CACHE_FILES)


def is_cache(files: list[str], folders: list[str]) -> bool:
    """Tell whether a folder is a cache, whole or begun, by the names of what lies in it."""
    if PLAN in files or (PRODUCTS.intersection(folders) and {MANIFEST, PREVIOUS} & {*files}):
        return True
    return HASHES in files and not not_of_a_cache([*files, *folders])
