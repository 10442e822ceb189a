"""A shard in the making: what the one on disk has already, and what is to be encoded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from common.errors import ShardError
from precompute.planning.plan import ProductPlan, ShardPlan
from shards.format import sidecar
from shards.format.members import Members, metadata_to_bytes
from shards.format.records import Record
from shards.format.sidecar import Skipped
from shards.format.writer import write_shard


class Kept(NamedTuple):
    """A record in the shard on disk: where its two members lie, and their checksums."""

    key: str
    span: tuple[int, ...]
    checksums: str

    def read(self, tar: IO[bytes]) -> Members | None:
        """Return the record's members, or None if they are damaged."""
        parts = []
        for start, size in (self.span[:2], self.span[2:]):
            tar.seek(start)
            parts.append(tar.read(size))
        intact = "".join(map(xxh3_64_hexdigest, parts)) == self.checksums
        return Members(self.key, parts[0], parts[1]) if intact else None


@dataclass(eq=False)
class Work:
    """A shard in the making.

    Attributes:
        product: that it is of.
        plan: what it is to hold.
        keys: of its items' records.
        abouts: of its items' records, the JSON members.
        kept: records that the shard on disk has already, by position among the items.
        wanted: positions of the items that are to be encoded; the others are kept or left out.
        skipped: rows left out so far.
    """

    product: ProductPlan
    plan: ShardPlan
    keys: list[str]
    abouts: list[bytes]
    kept: dict[int, Kept] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    skipped: list[Skipped] = field(default_factory=list)

    def leave_out(self, at: int, skipped: Skipped | None) -> None:
        """Neither keep nor encode an item; with a reason, say so in the sidecar."""
        self.kept.pop(at, None)
        self.wanted.discard(at)
        if skipped is not None:
            self.skipped.append(skipped)


def prepare_work(product: ProductPlan, shard: int, about: Callable[[int], dict[str, Any]]) -> Work:
    """Return a shard's work, with what the shard on disk has already.

    Args:
        product: that it is of.
        shard: its number.
        about: the JSON member of an item's record.
    """
    plan = product.shard(shard)
    ids = product.ids
    work = Work(
        product,
        plan,
        keys=[plan.key(at, ids) for at in range(len(plan.items))],
        abouts=[metadata_to_bytes(about(int(item))) for item in plan.items],
    )
    work.kept = _kept(work)
    work.wanted = set(range(len(plan.items))) - work.kept.keys()
    return work


def write_work(
    work: Work,
    records: Iterator[Record | Members],
    captions: Mapping[str, list[str]] | None = None,
) -> None:
    """Write a shard.

    Args:
        work: what it is to hold; its list of skipped rows may grow meanwhile.
        records: by their rows.
        captions: of latents, the keys of the prompts by that of the image.
    """
    prompts: list[list[str]] = []

    def noted() -> Iterator[Record | Members]:
        for record in records:
            if captions is not None:
                prompts.append(captions[record.key])
            yield record

    write_shard(
        work.product.folder,
        work.plan.shard,
        noted(),
        fingerprint=work.plan.fingerprint,
        identity=work.product.identity_digest,
        num_bytes=work.product.shard_bytes(work.plan),
        skipped=work.skipped,
        prompts=prompts,
        captions=work.plan.captions,
    )


def _kept(work: Work) -> dict[int, Kept]:
    """Return the records of the shard on disk that are as those to be made."""
    product = work.product
    folder, shard = product.folder, work.plan.shard
    try:
        card = sidecar.load(folder, shard)
        if card is None or card.identity != product.identity_digest:
            return {}
        positions = {key: at for at, key in enumerate(work.keys)}
        kept = {}
        with sidecar.tar_path(folder, shard).open("rb") as tar:
            for key, span, checksums in zip(card.keys, card.spans, card.checksums, strict=True):
                at = positions.get(key)
                if at is not None:
                    one = Kept(key, tuple(span), checksums)
                    members = one.read(tar)
                    if members is not None and members.metadata == work.abouts[at]:
                        kept[at] = one
    except (ShardError, OSError):
        return {}  # damaged: all of it is made again
    return kept
