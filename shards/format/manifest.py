"""The manifest: written last, so that its presence means the cache is complete."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from common.atomic_files import write_text
from common.errors import ShardError
from shards.format.incomplete import explain_missing_manifest
from shards.format.json_files import FORMAT_VERSION, Count, Digest, decode, plain, read_file
from shards.format.product import IndexFile, Product
from shards.format.specs import AnnotatorSpec, Bucket, ConditioningSpec, LatentSpec, TextSpec
from shards.format.tensor_spec import TensorSpec, record_bytes

MANIFEST = "manifest.json"
# The manifest of the last complete cache, while the cache is being changed. A cache that has only
# this one is not complete.
PREVIOUS = "manifest.previous.json"
# One row a sample, for other readers than ours. A cache of a former version has none.
SAMPLES = "samples.parquet"
DEFAULT_CONDITIONING = "conditioning"
# A control's name is a folder's name: nothing in a cache leads outside it.
CONTROL_NAME = r"[A-Za-z0-9_-]{1,100}"
Name = Annotated[str, Meta(pattern=rf"^{CONTROL_NAME}\Z")]
LARGEST_BUCKETS = 1024
# Of tensors; SD3's largest records take 4 MB. A hostile manifest must not make a reader allocate
# all memory.
LARGEST_RECORD_BYTES = 1 << 30
NO_DIGEST = b"0" * 64
REMEDY = "run precompute again, finished shards are kept"


@dataclass(frozen=True)
class Manifest:
    """What a complete cache holds, and what it was made with.

    Attributes:
        text: records of distinct prompts.
        text_spec: shapes of the text records.
        text_identity: digest of encoders, token lengths and number formats.
        buckets: shapes of the latent grids; each shard has one of them.
        latents: records of images.
        latent_spec: meaning of the latents.
        conditioning: records of conditioning images, by name of the control.
        conditioning_specs: meaning of the conditioning latents, by name of the control.
        validation: records of validation pairs, by name of the control; each holds the tensors of
            a text record and of a conditioning record.
        held_out: shards of latents, and so of conditioning latents, that training leaves out and
            measures its loss on; ascending.
        captions: digest of which prompts caption which image; see `product.captions_digest`.
        num_skipped: source rows that were left out.
        made_by: versions and base model, for people; nothing depends on it.
        annotators: what drew the conditioning images, by name of the control; none for a control
            that the source had, or that a version made which did not note it.
        samples: the file `SAMPLES`; None if there is none.
    """

    text: Product
    text_spec: TextSpec
    text_identity: str
    buckets: Annotated[list[Bucket], Meta(min_length=1, max_length=LARGEST_BUCKETS)]
    latents: Product
    latent_spec: LatentSpec
    conditioning: dict[Name, Product]
    conditioning_specs: dict[Name, ConditioningSpec]
    validation: dict[Name, Product]
    captions: str
    num_skipped: Count
    held_out: list[Count] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)
    annotators: dict[Name, AnnotatorSpec] = field(default_factory=dict)
    samples: IndexFile | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse a manifest that contradicts itself, and records that are far too large.

        Raises:
            ValueError: naming the parts.
        """
        self._check_controls()
        num_latents = self.latents.num_shards
        if self.held_out != sorted({shard for shard in self.held_out if shard < num_latents}):
            raise ValueError(f"held_out {self.held_out[:4]} … of {num_latents} shards of latents")
        for folder, product in self.products():
            self._check_product(folder, product)

    def _check_controls(self) -> None:
        names = set(self.conditioning)
        if names != set(self.conditioning_specs) or names != set(self.validation):
            raise ValueError("conditioning, conditioning_specs and validation name other controls")
        if not self.annotators.keys() <= names:
            raise ValueError("annotators name other controls than conditioning")
        latents = self.latent_spec.tensor_specs("", self.buckets[0])[""]
        for name, spec in self.conditioning_specs.items():
            conditioning = spec.tensor_specs("", self.buckets[0])[""]
            if conditioning.shape != latents.shape:
                raise ValueError(f"conditioning {name!r} {conditioning} beside latents {latents}")
        for name, product in self.conditioning.items():
            if product.num_shards != self.latents.num_shards:
                raise ValueError(f"conditioning {name!r} has not as many shards as latents")
            if product.shard_buckets != self.latents.shard_buckets:
                raise ValueError(f"conditioning {name!r} has other shard_buckets than latents")

    def _check_product(self, folder: str, product: Product) -> None:
        count, expected = len(product.shard_buckets), 0 if folder == "text" else product.num_shards
        if count != expected:
            raise ValueError(f"{folder}: {count} shard_buckets, {expected} expected")
        last = max(product.shard_buckets, default=0)
        if last >= len(self.buckets):
            raise ValueError(
                f"{folder}: shard_buckets up to {last}, of {len(self.buckets)} buckets"
            )
        largest = max(range(len(self.buckets)), key=lambda bucket: math.prod(self.buckets[bucket]))
        size = record_bytes(self.record_specs(folder, largest))
        if size > LARGEST_RECORD_BYTES:
            raise ValueError(f"{folder}: a record of {size} bytes")

    def record_specs(self, folder: str, bucket: int = 0) -> dict[str, TensorSpec]:
        """Return the tensors of a record, by name.

        Args:
            folder: the product's, relative to the cache; see `products`.
            bucket: index in `buckets`; makes no difference for text.
        """
        if folder == "text":
            return self.text_spec.tensor_specs()
        grid = self.buckets[bucket]
        if folder == "latents":
            return self.latent_spec.tensor_specs("latent", grid)
        kind, _, name = folder.partition("/")
        spec = self.conditioning_specs[name]
        conditioning = spec.tensor_specs("conditioning_latent", grid)
        if kind == "conditioning":
            return conditioning
        height, width = (cells * spec.vae_scale_factor for cells in grid)
        image = TensorSpec((3 + spec.extra_channels, height, width), "uint8")
        return {**self.text_spec.tensor_specs(), **conditioning, "conditioning_image": image}

    def specs_by_bucket(self, folder: str) -> list[dict[str, TensorSpec]]:
        """Return the tensors of a product's records, for each of `buckets`."""
        return [self.record_specs(folder, bucket) for bucket in range(len(self.buckets))]

    def bucket_records(self) -> list[int]:
        """Return how many images each bucket has."""
        counts = [0] * len(self.buckets)
        for bucket, records in zip(
            self.latents.shard_buckets, self.latents.shard_records, strict=True
        ):
            counts[bucket] += records
        return counts

    def training_records(self, conditioning_name: str) -> list[int]:
        """Return how many samples each shard of a control has for training: 0 if held out."""
        records = list(self.conditioning[conditioning_name].shard_records)
        for shard in self.held_out:
            records[shard] = 0
        return records

    def fingerprints(self, conditioning_name: str) -> dict[str, str]:
        """Return the digests of all that training on one control reads, its order included."""
        return {
            "text": self.text.fingerprint,
            "latents": self.latents.fingerprint,
            "conditioning": self.conditioning[conditioning_name].fingerprint,
            "captions": self.captions,
        }

    def products(self) -> Iterator[tuple[str, Product]]:
        """Yield (folder relative to the cache, product) for every product."""
        yield "text", self.text
        yield "latents", self.latents
        for name, product in self.conditioning.items():
            yield conditioning_folder(name), product
        for name, product in self.validation.items():
            yield validation_folder(name), product


def data_digest(fingerprints: Mapping[str, str]) -> str:
    """Return a digest of the images and captions among `Manifest.fingerprints`, without a control's
    own.
    """
    names = ("text", "latents", "captions")
    return hashlib.sha256(" ".join(fingerprints[name] for name in names).encode()).hexdigest()[:32]


class _OwnDigest(msgspec.Struct):
    """SHA-256 of the manifest's bytes with zeros in the place of these digits."""

    digest: Digest


def conditioning_folder(name: str) -> str:
    """Return where a cache keeps the conditioning latents of one control."""
    return f"conditioning/{name}"


def validation_folder(name: str) -> str:
    """Return where a cache keeps the validation pairs of one control."""
    return f"validation/{name}"


def write(cache: Path, manifest: Manifest) -> None:
    """Write, or replace, the cache's manifest."""
    values = {"digest": NO_DIGEST.decode(), **plain(manifest)}
    if not manifest.annotators:
        del values["annotators"]
    text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
    own_digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(cache / MANIFEST, text.replace(NO_DIGEST.decode(), own_digest, 1))


def load(cache: Path, name: str = MANIFEST) -> Manifest:
    """Return the manifest of a complete cache.

    Raises:
        ShardError: there is no cache here, it is incomplete (naming what is there), or its
            manifest is damaged or of another format version.
    """
    path = cache / name
    try:
        data = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(explain_missing_manifest(cache)) from None
    return from_json(data, path)


def from_json(data: bytes, where: object) -> Manifest:
    """Return the manifest that a file's bytes hold.

    Args:
        data: the file's bytes.
        where: the file's path or address, for the error.

    Raises:
        ShardError: it is damaged, changed, or of another format version.
    """
    manifest = decode(data, Manifest, where, REMEDY)
    own_digest = decode(data, _OwnDigest, where, REMEDY).digest
    if hashlib.sha256(data.replace(own_digest.encode(), NO_DIGEST, 1)).hexdigest() != own_digest:
        raise ShardError(f"{where}: changed since it was written; {REMEDY}")
    return manifest
