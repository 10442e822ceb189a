"""A product: all shards of one kind of record, as the manifest lists them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.format.json_files import LARGEST_FILE_BYTES, Count, Digest, digest, read_file
from shards.format.sidecar import Sidecar, sidecar_path

# What a shard takes in a manifest at most: two digests, three numbers, and what is between them.
MANIFEST_BYTES_A_SHARD = 200
# In all products together, with a megabyte for the rest.
MOST_SHARDS = (LARGEST_FILE_BYTES - (1 << 20)) // MANIFEST_BYTES_A_SHARD


@dataclass(frozen=True)
class Product:
    """One kind of record in the cache; the lists have one entry a shard.

    Attributes:
        fingerprint: digest of the shards' fingerprints, hence of everything that made them.
        num_records: in all shards.
        shard_records: records in each shard.
        shard_bytes: size of each tar.
        shard_sha256: of each tar.
        sidecar_sha256: of each sidecar.
        shard_buckets: index of each shard's bucket in the manifest's `buckets`; empty for text.
    """

    fingerprint: str
    num_records: Count
    shard_records: list[Count]
    shard_bytes: list[Count]
    shard_sha256: list[Digest]
    sidecar_sha256: list[Digest]
    shard_buckets: list[Count]

    def __post_init__(self) -> None:
        """Refuse lists that do not go together.

        Raises:
            ValueError: naming the lists.
        """
        lists = (self.shard_records, self.shard_bytes, self.shard_sha256, self.sidecar_sha256)
        counts = [len(entries) for entries in lists]
        if len(set(counts)) != 1:
            raise ValueError(f"{counts} shards with records, bytes, sha256, sidecars")
        if sum(self.shard_records) != self.num_records:
            raise ValueError(f"{sum(self.shard_records)} records, not {self.num_records}")
        if self.shard_buckets and len(self.shard_buckets) != self.num_shards:
            raise ValueError(f"{self.num_shards} shards, {len(self.shard_buckets)} shard_buckets")

    @property
    def num_shards(self) -> int:
        """How many shards the product has."""
        return len(self.shard_records)

    @property
    def num_bytes(self) -> int:
        """Size of all tars."""
        return sum(self.shard_bytes)


@dataclass(frozen=True)
class IndexFile:
    """The index of a cache's samples, as the manifest lists it.

    Attributes:
        num_rows: samples of all controls together.
        num_bytes: size of the file.
        sha256: of the file.
    """

    num_rows: Count
    num_bytes: Count
    sha256: Digest


def product_of(
    folder: Path, sidecars: Iterable[Sidecar], shard_buckets: Sequence[int] = ()
) -> Product:
    """Return the manifest's entry for a product whose shards are all finished.

    Args:
        folder: the product's.
        sidecars: of all its shards, in order, as they are in the folder; iterated once.
        shard_buckets: of all its shards; none for text.
    """
    fingerprints, records, sizes, digests, sidecar_digests = [], [], [], [], []
    for sidecar in sidecars:
        fingerprints.append(sidecar.fingerprint)
        records.append(sidecar.num_records)
        sizes.append(sidecar.tar_bytes)
        digests.append(sidecar.sha256)
        data = read_file(sidecar_path(folder, sidecar.shard))
        sidecar_digests.append(hashlib.sha256(data).hexdigest())
    return Product(
        fingerprint=digest(fingerprints),
        num_records=sum(records),
        shard_records=records,
        shard_bytes=sizes,
        shard_sha256=digests,
        sidecar_sha256=sidecar_digests,
        shard_buckets=list(shard_buckets),
    )


def captions_digest(latents: Iterable[Sidecar]) -> str:
    """Return the digest of which prompts caption which image, from the latents' sidecars."""
    return digest(list(map(shard_captions_digest, latents)))


def shard_captions_digest(latents: Sidecar) -> str:
    """Return the digest of which prompts caption which image of a shard of latents."""
    return digest([latents.keys, latents.prompts])


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
