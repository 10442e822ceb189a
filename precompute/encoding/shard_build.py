"""A shard that is being built: which of its records exist already, and which must be encoded."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from common.errors import ShardError
from precompute.planning.plan import ProductPlan, ShardPlan
from shards.format import sidecar
from shards.format.members import Members, metadata_to_bytes
from shards.format.sidecar import Skipped
from shards.format.writer import write_shard


class ExistingRecord(NamedTuple):
    """A record in the shard on disk: its key, where its two members lie, and their checksums."""

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
class ShardBuild:
    """A shard that is being built; positions are those of its items in the plan.

    Attributes:
        product: the shard's product.
        plan: what the shard is to hold.
        keys: of the items' records.
        metadata: JSON members of the items' records.
        kept: records that the shard on disk has already, by position.
        to_encode: positions of the items to encode; all others are kept or left out.
        skipped: rows that are left out so far, by their number in the inventory.
        caption_keys: for latents, the keys of each image's prompts by the image's key.
        obsolete: files that nobody needs any more once the shard is written.
    """

    product: ProductPlan
    plan: ShardPlan
    keys: list[str]
    metadata: list[bytes]
    kept: dict[int, ExistingRecord] = field(default_factory=dict)
    to_encode: set[int] = field(default_factory=set)
    skipped: dict[int, Skipped] = field(default_factory=dict)
    caption_keys: Mapping[str, list[str]] | None = None
    obsolete: list[Path] = field(default_factory=list)

    def leave_out(self, position: int) -> None:
        """Neither keep nor encode an item."""
        self.kept.pop(position, None)
        self.to_encode.discard(position)

    def read_kept(self, positions: Iterable[int]) -> list[Members]:
        """Return the members of the kept records among some items.

        Raises:
            ShardError: one of them is damaged.
        """
        kept = [self.kept[position] for position in positions if position in self.kept]
        if not kept:
            return []
        records = []
        with sidecar.tar_path(self.product.folder, self.plan.shard).open("rb") as tar:
            for record in kept:
                members = record.read(tar)
                if members is None:
                    raise ShardError(f"{tar.name}: changed while precompute was running; run again")
                records.append(members)
        return records

    def write(self, records: Sequence[Members]) -> None:
        """Write the shard's tar and its sidecar.

        Args:
            records: the members of its records, by ascending slot.
        """
        keys = self.caption_keys
        write_shard(
            self.product.folder,
            self.plan.shard,
            records,
            fingerprint=self.plan.fingerprint,
            identity=self.product.identity_digest,
            num_bytes=self.product.shard_bytes(self.plan),
            skipped=list(self.skipped.values()),
            prompts=[] if keys is None else [keys[record.key] for record in records],
            captions=self.plan.captions,
        )
        for path in self.obsolete:
            path.unlink(missing_ok=True)


def prepare_build(
    product: ProductPlan, shard: int, metadata: Callable[[int], dict[str, Any]]
) -> ShardBuild:
    """Return the build of a shard; it keeps what the shard on disk has already.

    Args:
        product: the shard's product.
        shard: its number.
        metadata: returns the JSON member of an item's record.
    """
    plan = product.shard(shard)
    build = ShardBuild(
        product,
        plan,
        keys=[plan.key(position, product.ids) for position in range(len(plan.items))],
        metadata=[metadata_to_bytes(metadata(int(item))) for item in plan.items],
    )
    build.kept = _find_kept(build)
    build.to_encode = set(range(len(plan.items))) - build.kept.keys()
    return build


def _find_kept(build: ShardBuild) -> dict[int, ExistingRecord]:
    """Return the planned records that the shard on disk has already, by position."""
    product = build.product
    folder, shard = product.folder, build.plan.shard
    try:
        existing = sidecar.load(folder, shard)
        if existing is None or existing.identity != product.identity_digest:
            return {}
        positions = {key: position for position, key in enumerate(build.keys)}
        kept = {}
        with sidecar.tar_path(folder, shard).open("rb") as tar:
            for entry in zip(existing.keys, existing.spans, existing.checksums, strict=True):
                key, span, checksums = entry
                position = positions.get(key)
                if position is not None:
                    record = ExistingRecord(key, tuple(span), checksums)
                    members = record.read(tar)
                    if members is not None and members.metadata == build.metadata[position]:
                        kept[position] = record
    except (ShardError, OSError):
        return {}  # the shard is damaged: encode all of it again
    return kept
