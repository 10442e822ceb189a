"""A cache of random numbers in the true format, of any size: for measurements and for tests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shards.format import manifest
from shards.format.keys import record_key
from shards.format.manifest import Manifest
from shards.format.product import captions_digest, product_of
from shards.format.records import Record
from shards.format.specs import Bucket, LatentSpec, TextSpec
from shards.format.tensor_spec import TensorSpec
from shards.format.writer import write_shard
from shards.reading.tensors import torch_dtype


@dataclass(frozen=True)
class Shape:
    """How large the records are.

    Attributes:
        side: of the latent grid; pixels / 8.
        tokens: of T5.
        clip_width: of CLIP-L and CLIP-G side by side.
        t5_width: of T5.
        pooled_width: of the pooled embeddings.
    """

    side: int
    tokens: int = 77
    clip_width: int = 2048
    t5_width: int = 4096
    pooled_width: int = 2048

    def text_spec(self) -> TextSpec:
        """Return what a text record holds."""
        return TextSpec(
            77, self.clip_width, self.tokens, self.t5_width, self.pooled_width, "bfloat16"
        )

    def latent_spec(self) -> LatentSpec:
        """Return what a latent record holds."""
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
        folder: the cache's.
        shape: of the records.
        num_shards: of latents, conditioning and text each; text has one more.
        images_per_shard: images, conditioning images and prompts.
        seed: of the numbers.
        buckets: latent grids, which the shards have in turn; by default the shape's square alone.
    """
    text, latent = shape.text_spec(), shape.latent_spec()
    grids = list(buckets) or [(shape.side, shape.side)]
    shard_buckets = [shard % len(grids) for shard in range(num_shards)]
    generator = torch.Generator().manual_seed(seed)

    def drawn(specs: dict[str, TensorSpec]) -> dict[str, Tensor]:
        return {
            name: torch.randn(spec.shape, generator=generator).to(torch_dtype(spec))
            for name, spec in specs.items()
        }

    def key(shard: int, row: int, number: int) -> str:
        return record_key(shard, row, f"{number:016x}")

    def records(shard: int, name: str) -> Iterator[Record]:
        specs = latent.tensor_specs(name, grids[shard_buckets[shard]])
        for row in range(images_per_shard):
            number = shard * images_per_shard + row
            yield Record(key(shard, row, number), drawn(specs), {"image_hash": f"{number:032x}"})

    def prompts(shard: int) -> Iterator[Record]:
        rows = range(images_per_shard) if shard else range(1)
        for row in rows:
            prompt = f"prompt {shard} {row}" if shard else ""
            yield Record(key(shard, row, row), drawn(text.tensor_specs()), {"prompt": prompt})

    texts = [
        write_shard(folder / "text", shard, prompts(shard), fingerprint="0")
        for shard in range(num_shards + 1)
    ]
    latents = [
        write_shard(
            folder / "latents",
            shard,
            records(shard, "latent"),
            fingerprint="0",
            prompts=[[key(shard + 1, row, row)] for row in range(images_per_shard)],
        )
        for shard in range(num_shards)
    ]
    controls = folder / "conditioning" / "conditioning"
    conditioning = [
        write_shard(controls, shard, records(shard, "conditioning_latent"), fingerprint="0")
        for shard in range(num_shards)
    ]
    manifest.write(
        folder,
        Manifest(
            text=product_of(folder / "text", texts),
            text_spec=text,
            text_identity="0",
            buckets=grids,
            latents=product_of(folder / "latents", latents, shard_buckets),
            latent_spec=latent,
            conditioning={"conditioning": product_of(controls, conditioning, shard_buckets)},
            conditioning_specs={"conditioning": latent},
            validation={"conditioning": product_of(folder, [])},
            captions=captions_digest(latents),
            num_skipped=0,
            made_by={"base": "random numbers"},
        ),
    )
