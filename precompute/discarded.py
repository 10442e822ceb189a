"""What a run would throw away of the cache that it continues; much is not thrown away unasked."""

import json
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError, ShardError
from common.provenance import RUN
from precompute.planning.context import Context
from precompute.planning.plan import ProductPlan
from shards.format import seal, sidecar
from shards.format.expected_cache import read_expected
from shards.format.manifest import Manifest
from shards.format.members import metadata_to_bytes
from shards.format.sidecar import Sidecar

# What a run may encode again or drop of a product without being told to.
TOLERATED = 0.1
SECONDS_A_RECORD = "seconds_a_record"


@dataclass(frozen=True)
class Discarded:
    """What would go of a product.

    Attributes:
        folder: the product's.
        going: how many records would be dropped or encoded again.
        standing: how many there are.
        hours: of encoding, by a former run's clock; None if it is not known.
        reason: what has changed; may be empty.
    """

    folder: str
    going: int
    standing: int
    hours: float | None
    reason: str

    def __str__(self) -> str:
        """Return a line for people."""
        hours = "" if self.hours is None else f", {_duration(self.hours)} of encoding"
        reason = f" ({self.reason})" if self.reason else ""
        return f"  {self.folder}: {self.going} of {self.standing} records{hours}{reason}"


def refuse_to_discard(context: Context) -> None:
    """Refuse to throw away more than a tenth of a product, unless the settings say so.

    Raises:
        ConfigError: listing what would go.
    """
    if not context.config.overwrite and (lost := describe_discarded(context)):
        raise ConfigError(f"{lost}\nGive --overwrite to go ahead, or another --cache.")


def describe_discarded(context: Context) -> str:
    """Return in some lines what the run would throw away; "" if it is a tenth at most."""
    discarded = find_discarded(context)
    if not any(one.going > TOLERATED * one.standing for one in discarded):
        return ""
    lines = [
        f"--cache {context.config.cache}: this run would throw away more than a tenth of what "
        "stands there:",
        *map(str, discarded),
    ]
    before = seal.previous_manifest(context.config.cache)
    views = before.made_by.get("views") if before else None
    if views and views != context.config.described_views:
        lines.append(f"  it was made with {views}: give the same to add a control to it")
    others = _other_controls(context, before)
    if others and any(one.folder == "latents" for one in discarded):
        names = ", ".join(map(repr, others))
        lines.append(f"  other controls, which go with their latents: {names}")
    return "\n".join(lines)


def describe_put_out(context: Context) -> str:
    """Return a line on the controls that are to be made again after the run; "" if there are none.

    What is drawn from an image that stays is kept then.
    """
    before, latents = seal.previous_manifest(context.config.cache), context.products.latents
    others = _other_controls(context, before)
    same_shape = before is not None and before.latents.num_shards == latents.num_shards
    if not others or (same_shape and not context.shards_to_build(latents)):
        return ""
    names = ", ".join(map(repr, others))
    return f"other controls go with the latents, which change, and are to be made again: {names}"


def find_discarded(context: Context) -> list[Discarded]:
    """Return what would go of each product, the few validation pairs aside.

    What the cache's plan has given up already does not count again: another worker, or a run that
    was interrupted, has been told to.
    """
    seconds = seconds_a_record(context.config.cache)
    decided = _decided(context.config.cache)
    found = []
    for folder, product in context.products_by_folder().items():
        if product is context.products.validation or decided.get(folder) == product.fingerprints:
            continue
        going, standing = _count(context, product)
        if going:
            rate = seconds.get("text" if product is context.products.text else "images")
            hours = None if rate is None else going * rate / 3600
            reason = context.reasons.get(folder, "")
            found.append(Discarded(folder, going, standing, hours, reason))
    return found


def seconds_a_record(cache: Path) -> dict[str, float]:
    """Return how long the cache's encoders took for a text and for an image; without what nobody
    measured.
    """
    with suppress(OSError, ValueError, KeyError, AttributeError):
        run = json.loads((cache / RUN).read_text("utf-8"))
        return {name: float(seconds) for name, seconds in run[SECONDS_A_RECORD].items()}
    return {}


def _decided(cache: Path) -> dict[str, list[str]]:
    """Return the fingerprints of the shards in the cache's plan, by product."""
    with suppress(ShardError):
        products = read_expected(cache)[0].products
        return {folder: product.fingerprints for folder, product in products.items()}
    return {}


def _count(context: Context, product: ProductPlan) -> tuple[int, int]:
    """Return how many of a product's records on disk would go, and how many there are."""
    finished = {
        shard
        for shard, summary in enumerate(context.finished[product.folder])
        if summary is not None
    }
    staying = standing = product.count_records(sorted(finished))
    for shard, card in _sidecars(product.folder, finished):
        standing += len(card.keys)
        staying += _count_staying(context, product, shard, card)
    return standing - staying, standing


def _sidecars(folder: Path, finished: Container[int]) -> Iterator[tuple[int, Sidecar]]:
    """Yield the whole shards in a folder that are not as planned; those that are may be many."""
    for path in sorted(folder.glob("*.json")):
        shard = int(path.stem) if path.stem.isdecimal() else None
        if shard is None or shard in finished or sidecar.load_summary(folder, shard) is None:
            continue
        with suppress(ShardError, OSError):
            yield shard, sidecar.load_present(folder, shard)


def _count_staying(context: Context, product: ProductPlan, shard: int, card: Sidecar) -> int:
    """Return how many of a shard's records the run would copy into the new one."""
    if shard >= product.num_shards or card.identity != product.identity_digest:
        return 0
    plan = product.shard(shard)
    items = {plan.key(at, product.ids): int(item) for at, item in enumerate(plan.items)}
    if product is not context.products.conditioning:
        return len(items.keys() & set(card.keys))
    # Their keys are those of the latents: which conditioning image it was, the metadata say.
    staying = 0
    with sidecar.tar_path(product.folder, shard).open("rb") as tar:
        for key, (_, _, start, size) in zip(card.keys, card.spans, strict=True):
            if (item := items.get(key)) is not None:
                tar.seek(start)
                staying += tar.read(size) == metadata_to_bytes(context.metadata(product, item))
    return staying


def _other_controls(context: Context, before: Manifest | None) -> list[str]:
    names = before.conditioning if before else ()
    return [name for name in names if name != context.config.conditioning_name]


def _duration(hours: float) -> str:
    minutes = 60 * hours
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min"
