"""The manifest: written last, so that its presence means the cache is complete."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta

from common.atomic_files import write_text
from common.errors import ShardError
from shards.format.json_files import FORMAT_VERSION, Count, Digest, decode, read_file
from shards.format.records import TensorSpec, record_bytes
from shards.format.sidecar import Sidecar, sidecar_path

MANIFEST = "manifest.json"
# Settings and versions of the run that made the cache; for people.
# The last complete cache's manifest while it is being changed; no cache is complete because of it.
PREVIOUS = "manifest.previous.json"
DEFAULT_CONDITIONING = "conditioning"
# A control's name is a folder's name: nothing in a cache leads outside it.
CONTROL_NAME = r"[A-Za-z0-9_-]{1,100}"
Name = Annotated[str, Meta(pattern=rf"^{CONTROL_NAME}\Z")]
DType = Annotated[str, Meta(pattern=r"^(float16|bfloat16|float32)\Z")]
Posterior = Annotated[str, Meta(pattern=r"^(mean|mean_std)\Z")]
PixelRange = Annotated[str, Meta(pattern=r"^(-1_1|0_1)\Z")]
# Of a tensor's axes.
Size = Annotated[int, Meta(ge=1, le=1 << 16)]
LARGEST_BUCKETS = 1024
# Height and width of a latent grid.
Bucket = tuple[Size, Size]
# Of tensors; SD3's largest take 4 MB. Nobody's manifest shall make a reader ask for all memory.
LARGEST_RECORD_BYTES = 1 << 30
NO_DIGEST = b"0" * 64


@dataclass(frozen=True)
class TextSpec:
    """Shapes of a text record: `clip_embeds` [clip_tokens, clip_width], `t5_embeds`
    [max_sequence_length, t5_width], `pooled_embeds` [pooled_width].
    """

    clip_tokens: Size
    clip_width: Size
    max_sequence_length: Size
    t5_width: Size
    pooled_width: Size
    dtype: DType

    def tensors(self) -> dict[str, TensorSpec]:
        """Return what a text record holds."""
        dtype = getattr(torch, self.dtype)
        return {
            "clip_embeds": TensorSpec((self.clip_tokens, self.clip_width), dtype),
            "t5_embeds": TensorSpec((self.max_sequence_length, self.t5_width), dtype),
            "pooled_embeds": TensorSpec((self.pooled_width,), dtype),
        }


@dataclass(frozen=True)
class LatentSpec:
    """Meaning of a latent or conditioning latent [latent_channels, height, width] of any bucket.

    Attributes:
        latent_channels: of the VAE.
        vae_scale_factor: pixels a grid cell.
        scaling_factor: to be applied in training as (latent - shift_factor) * scaling_factor.
        shift_factor: see `scaling_factor`.
        posterior: `mean`, or `mean_std` where the standard deviation is kept as well.
        pixel_range: `-1_1`, what the VAE was trained on; `0_1` for conditioning latents encoded
            as the diffusers training script does.
        dtype: of the stored tensors.
    """

    latent_channels: Size
    vae_scale_factor: Size
    scaling_factor: float
    shift_factor: float
    posterior: Posterior
    pixel_range: PixelRange
    dtype: DType

    def tensors(self, name: str, bucket: Bucket) -> dict[str, TensorSpec]:
        """Return what a record of latents called `name` holds in a bucket."""
        shape = (self.latent_channels, *bucket)
        names = [name, f"{name}_std"] if self.posterior == "mean_std" else [name]
        return dict.fromkeys(names, TensorSpec(shape, getattr(torch, self.dtype)))


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
        shard_buckets: which of the manifest's buckets each shard's records are of; empty for text.
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
            ValueError: naming what.
        """
        lists = (self.shard_records, self.shard_bytes, self.shard_sha256, self.sidecar_sha256)
        counts = [len(one) for one in lists]
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
class Manifest:
    """What a complete cache holds, and what it was made with.

    Attributes:
        text: records of distinct prompts.
        text_spec: their shapes.
        text_identity: digest of encoders, token lengths and number formats.
        buckets: the shapes that latents come in, one a shard; one alone where all are alike.
        latents: records of images.
        latent_spec: what they are.
        conditioning: records of conditioning images, by name of the control.
        conditioning_specs: what they are, by the same names.
        validation: records of validation pairs, shaped as text and conditioning records are, by
            the same names.
        held_out: shards of latents, and so of conditioning latents, that training leaves out and
            measures its loss on; ascending.
        captions: digest of which prompts caption which image; see `captions_digest`.
        num_skipped: source rows that were left out.
        made_by: versions and base model, for people; nothing depends on it.
    """

    text: Product
    text_spec: TextSpec
    text_identity: str
    buckets: Annotated[list[Bucket], Meta(min_length=1, max_length=LARGEST_BUCKETS)]
    latents: Product
    latent_spec: LatentSpec
    conditioning: dict[Name, Product]
    conditioning_specs: dict[Name, LatentSpec]
    validation: dict[Name, Product]
    captions: str
    num_skipped: Count
    held_out: list[Count] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse controls that lack a part, and records beyond all measure.

        Raises:
            ValueError: naming them.
        """
        names, num_latents = set(self.conditioning), self.latents.num_shards
        if names != set(self.conditioning_specs) or names != set(self.validation):
            raise ValueError("conditioning, conditioning_specs and validation name other controls")
        for name, spec in self.conditioning_specs.items():
            ours = spec.tensors("", self.buckets[0])
            latents = self.latent_spec.tensors("", self.buckets[0])
            if ours[""].shape != latents[""].shape:
                raise ValueError(f"conditioning {name!r} {ours['']} beside latents {latents['']}")
        for name, product in self.conditioning.items():
            if product.num_shards != num_latents:
                raise ValueError(f"conditioning {name!r} has not as many shards as latents")
            if product.shard_buckets != self.latents.shard_buckets:
                raise ValueError(f"conditioning {name!r} has other shard_buckets than latents")
        if self.held_out != sorted({shard for shard in self.held_out if shard < num_latents}):
            raise ValueError(f"held_out {self.held_out[:4]} … of {num_latents} shards of latents")
        largest = max(range(len(self.buckets)), key=lambda at: math.prod(self.buckets[at]))
        for folder, product in self.products():
            expected = 0 if folder == "text" else product.num_shards
            if len(product.shard_buckets) != expected:
                found = len(product.shard_buckets)
                raise ValueError(f"{folder}: {found} shard_buckets, {expected} expected")
            if max(product.shard_buckets, default=0) >= len(self.buckets):
                raise ValueError(
                    f"{folder}: shard_buckets up to {max(product.shard_buckets)}, "
                    f"of {len(self.buckets)} buckets"
                )
            size = record_bytes(self.tensors(folder, largest))
            if size > LARGEST_RECORD_BYTES:
                raise ValueError(f"{folder}: a record of {size} bytes")

    def tensors(self, folder: str, bucket: int = 0) -> dict[str, TensorSpec]:
        """Return what each record of a product's shards of a bucket holds.

        Args:
            folder: the product's, relative to the cache; see `products`.
            bucket: which of `buckets`; of no account for text.
        """
        if folder == "text":
            return self.text_spec.tensors()
        if folder == "latents":
            return self.latent_spec.tensors("latent", self.buckets[bucket])
        kind, _, name = folder.partition("/")
        spec = self.conditioning_specs[name]
        if kind == "conditioning":
            return spec.tensors("conditioning_latent", self.buckets[bucket])
        height, width = (cells * spec.vae_scale_factor for cells in self.buckets[bucket])
        return {
            **self.text_spec.tensors(),
            **spec.tensors("conditioning_latent", self.buckets[bucket]),
            "conditioning_image": TensorSpec((3, height, width), torch.uint8),
        }

    def expected(self, folder: str) -> list[dict[str, TensorSpec]]:
        """Return what each record of a product holds, by bucket."""
        return [self.tensors(folder, bucket) for bucket in range(len(self.buckets))]

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


class _Seal(msgspec.Struct):
    """SHA-256 of the manifest's bytes with zeros in the place of these digits."""

    digest: Digest


def conditioning_folder(name: str) -> str:
    """Return where a cache keeps the conditioning latents of one kind of control."""
    return f"conditioning/{name}"


def validation_folder(name: str) -> str:
    """Return where a cache keeps the validation pairs of one kind of control."""
    return f"validation/{name}"


def digest(value: Any) -> str:
    """Return a short, stable digest of plain JSON values."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def product_of(
    folder: Path, sidecars: Iterable[Sidecar], shard_buckets: Sequence[int] = ()
) -> Product:
    """Return the manifest's entry for a product whose shards are all finished.

    Args:
        folder: the product's.
        sidecars: of all its shards, in order, as they stand in the folder; gone through once.
        shard_buckets: of all its shards; none for text.
    """
    fingerprints, records, sizes, digests, sidecar_digests = [], [], [], [], []
    for one in sidecars:
        fingerprints.append(one.fingerprint)
        records.append(one.num_records)
        sizes.append(one.tar_bytes)
        digests.append(one.sha256)
        data = read_file(sidecar_path(folder, one.shard))
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
    return digest([digest([one.keys, one.prompts]) for one in latents])


def write(cache: Path, manifest: Manifest) -> None:
    """Write, or replace, the cache's manifest."""
    plain = {"digest": NO_DIGEST.decode(), **dataclasses.asdict(manifest)}
    text = json.dumps(plain, ensure_ascii=False, indent=1) + "\n"
    seal = hashlib.sha256(text.encode()).hexdigest()
    write_text(cache / MANIFEST, text.replace(NO_DIGEST.decode(), seal, 1))


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
        raise ShardError(_why_no_manifest(cache)) from None
    return from_json(data, path)


def from_json(data: bytes, where: object) -> Manifest:
    """Return the manifest that a file's bytes hold.

    Raises:
        ShardError: it is damaged, changed, or of another format version.
    """
    remedy = "run precompute again, finished shards are kept"
    found = decode(data, Manifest, where, remedy)
    seal = decode(data, _Seal, where, remedy).digest
    if hashlib.sha256(data.replace(seal.encode(), NO_DIGEST, 1)).hexdigest() != seal:
        raise ShardError(f"{where}: changed since it was written; {remedy}")
    return found


def _why_no_manifest(cache: Path) -> str:
    """Say what stands where a complete cache was expected."""
    if not cache.is_dir():
        return f"{cache}: no such folder; make the cache first: python -m precompute"
    finished = {
        folder.relative_to(cache).as_posix(): _shard_numbers(folder)
        for folder in (cache / "text", cache / "latents", *sorted(cache.glob("conditioning/*")))
        if folder.is_dir()
    }
    if not finished:
        return f"{cache}: not a cache (no manifest.json, no shards); make one: python -m precompute"
    listing = "; ".join(
        f"{name}: {len(numbers)} finished{_gaps(numbers)}" for name, numbers in finished.items()
    )
    return (
        f"{cache}: the cache is incomplete, manifest.json is missing ({listing}). "
        "Run the same python -m precompute command again; finished shards are kept."
    )


def _shard_numbers(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir())
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{6,9}\.json", name))


def _gaps(numbers: list[int]) -> str:
    present = set(numbers)
    missing = (k for k in range(max(numbers, default=-1) + 1) if k not in present)
    first = [f"{k:06d}" for k in itertools.islice(missing, 8)]
    return f", missing {', '.join(first)}" if first else ""
