"""A cache of random numbers in the true format, of any size, for measurements and tests."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shards.format import manifest
from shards.format.keys import record_key
from shards.format.manifest import Manifest
from shards.format.product import captions_digest, product_of
from shards.format.published import samples
from shards.format.records import Record
from shards.format.specs import Bucket, ConditioningSpec, LatentSpec, TextSpec
from shards.format.tensor_spec import TensorSpec
from shards.format.writer import write_shard
from shards.reading.tensors import torch_dtype


@dataclass(frozen=True)
class Shape:
    """Sizes of the records.

    Attributes:
        side: side of the latent grid; pixels / 8.
        tokens: number of T5 tokens.
        clip_width: width of the embeddings of CLIP-L and CLIP-G side by side.
        t5_width: width of T5's embeddings.
        pooled_width: width of the pooled embeddings.
    """

    side: int
    tokens: int = 77
    clip_width: int = 2048
    t5_width: int = 4096
    pooled_width: int = 2048

    def text_spec(self) -> TextSpec:
        """Return the specification of text records."""
        return TextSpec(
            77, self.clip_width, self.tokens, self.t5_width, self.pooled_width, "bfloat16"
        )

    def latent_spec(self) -> LatentSpec:
        """Return the specification of latent records."""
        return LatentSpec(16, 8, 1.5305, 0.0609, "mean", "-1_1", dtype="bfloat16")


TINY = Shape(side=4, tokens=4, clip_width=8, t5_width=16, pooled_width=8)


def write_cache(
    folder: Path,
    shape: Shape,
    num_shards: int,
    images_per_shard: int,
    *,
    seed: int = 0,
    buckets: Sequence[Bucket] = (),
) -> None:
    """Write a complete cache in which every image has a prompt of its own.

    Args:
        folder: folder of the cache.
        shape: sizes of the records.
        num_shards: number of shards of latents and of conditioning; text has one more, the first,
            which holds the empty prompt.
        images_per_shard: number of images, conditioning images and prompts in a shard.
        seed: seed of the numbers.
        buckets: latent grids, which the shards have in turn; the shape's square alone by default.
    """
    grids = list(buckets) or [(shape.side, shape.side)]
    shard_buckets = [shard % len(grids) for shard in range(num_shards)]
    shard_grids = [grids[bucket] for bucket in shard_buckets]
    records = _RandomRecords(shape, images_per_shard, seed)
    texts = [
        write_shard(folder / "text", shard, records.prompts(shard), fingerprint="0")
        for shard in range(num_shards + 1)
    ]
    latents = [
        write_shard(
            folder / "latents",
            shard,
            records.images(shard, "latent", grid),
            fingerprint="0",
            prompts=[[_key(shard + 1, slot, slot)] for slot in range(images_per_shard)],
        )
        for shard, grid in enumerate(shard_grids)
    ]
    controls = folder / "conditioning" / "conditioning"
    conditioning = [
        write_shard(
            controls, shard, records.images(shard, "conditioning_latent", grid), fingerprint="0"
        )
        for shard, grid in enumerate(shard_grids)
    ]
    made = Manifest(
        text=product_of(folder / "text", texts),
        text_spec=shape.text_spec(),
        text_identity="0",
        buckets=grids,
        latents=product_of(folder / "latents", latents, shard_buckets),
        latent_spec=shape.latent_spec(),
        conditioning={"conditioning": product_of(controls, conditioning, shard_buckets)},
        conditioning_specs={"conditioning": ConditioningSpec(**asdict(shape.latent_spec()))},
        validation={"conditioning": product_of(folder, [])},
        captions=captions_digest(latents),
        num_skipped=0,
        made_by={"base": "random numbers"},
    )
    manifest.write(folder, replace(made, samples=samples.write(folder, made)))


class _RandomRecords:
    """Makes the records of a cache, in any order of its shards.

    Args:
        shape: sizes of the records.
        per_shard: number of records in a shard.
        seed: seed of the numbers.
    """

    def __init__(self, shape: Shape, per_shard: int, seed: int) -> None:
        self._shape = shape
        self._per_shard = per_shard
        self._generator = torch.Generator().manual_seed(seed)

    def prompts(self, shard: int) -> Iterator[Record]:
        """Yield the text records of a shard; the first shard holds the empty prompt alone."""
        specs = self._shape.text_spec().tensor_specs()
        for slot in range(self._per_shard if shard else 1):
            prompt = f"prompt {shard} {slot}" if shard else ""
            yield Record(_key(shard, slot, slot), self._tensors(specs), {"prompt": prompt})

    def images(self, shard: int, name: str, grid: Bucket) -> Iterator[Record]:
        """Yield the latent records of a shard.

        Args:
            shard: number of the shard.
            name: name of the tensor.
            grid: height and width of the latents.
        """
        specs = self._shape.latent_spec().tensor_specs(name, grid)
        for slot in range(self._per_shard):
            number = shard * self._per_shard + slot
            about = {"image_hash": f"{number:032x}"}
            yield Record(_key(shard, slot, number), self._tensors(specs), about)

    def _tensors(self, specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
        return {
            name: torch.randn(spec.shape, generator=self._generator).to(torch_dtype(spec))
            for name, spec in specs.items()
        }


def _key(shard: int, slot: int, number: int) -> str:
    return record_key(shard, slot, f"{number:016x}")
