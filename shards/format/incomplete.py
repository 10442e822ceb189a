"""Telling a user why a folder is no complete cache."""

import itertools
import re
from pathlib import Path

LISTED_GAPS = 8


def explain_missing_manifest(cache: Path) -> str:
    """Return what is in a folder that has no manifest, and what to do."""
    if not cache.is_dir():
        return f"{cache}: no such folder; make the cache first: python -m precompute"
    finished = {
        folder.relative_to(cache).as_posix(): _finished_shards(folder)
        for folder in (cache / "text", cache / "latents", *sorted(cache.glob("conditioning/*")))
        if folder.is_dir()
    }
    if not finished:
        return f"{cache}: not a cache (no manifest.json, no shards); make one: python -m precompute"
    listing = "; ".join(
        f"{name}: {len(shards)} finished{_gaps(shards)}" for name, shards in finished.items()
    )
    return (
        f"{cache}: the cache is incomplete, manifest.json is missing ({listing}). "
        "Run the same python -m precompute command again; finished shards are kept."
    )


def _finished_shards(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir())
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{6,9}\.json", name))


def _gaps(shards: list[int]) -> str:
    present = set(shards)
    # Lazily: a file's name may be a huge number.
    missing = (shard for shard in range(max(shards, default=-1) + 1) if shard not in present)
    first = [f"{shard:06d}" for shard in itertools.islice(missing, LISTED_GAPS)]
    return f", missing {', '.join(first)}" if first else ""
