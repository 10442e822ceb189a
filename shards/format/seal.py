"""Sealing: from finished shards to a complete cache.

A process that finds every expected shard writes the manifest: a worker of stage 1, or
`python -m shards seal` after parts made on machines without a common disk were copied together.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from common.errors import ShardError
from shards.format import manifest, sidecar
from shards.format.expected_cache import ExpectedCache, ExpectedProduct
from shards.format.json_files import digest
from shards.format.manifest import Manifest, conditioning_folder, validation_folder
from shards.format.product import Product, captions_digest, product_of
from shards.format.sidecar import Sidecar


def previous_manifest(cache: Path) -> Manifest | None:
    """Return the manifest of a cache as it was last complete, if it ever was."""
    for name in (manifest.MANIFEST, manifest.PREVIOUS):
        if (cache / name).is_file():
            with contextlib.suppress(ShardError):
                return manifest.load(cache, name)
    return None


def seal(cache: Path, expected: ExpectedCache) -> Manifest:
    """Write the manifest of a cache whose shards are all there; return it.

    Other controls stay in it if they were made for these latents, and their validation pairs if
    their prompts were encoded as they are now; otherwise they must be made again.

    Raises:
        ShardError: shards are missing or differ from what is expected; naming them.
    """
    missing = expected.missing(cache)
    if missing:
        raise ShardError(f"{cache}: not complete; {expected.describe(missing)}")
    before = previous_manifest(cache)
    now = _manifest(cache, expected, before)
    if now != before or not (cache / manifest.MANIFEST).is_file():
        manifest.write(cache, now)
    (cache / manifest.PREVIOUS).unlink(missing_ok=True)
    return now


def _manifest(cache: Path, expected: ExpectedCache, before: Manifest | None) -> Manifest:
    products, num_skipped = _products(cache, expected)
    latents = products["latents"]
    text_identity = digest(expected.products["text"].identity)
    name = expected.conditioning_name
    conditioning = {name: products[conditioning_folder(name)]}
    specs = {name: expected.conditioning_spec}
    validation = {name: products[validation_folder(name)]}
    if before and before.latents.fingerprint == latents.fingerprint:
        conditioning = before.conditioning | conditioning
        specs = before.conditioning_specs | specs
        if before.text_identity == text_identity:
            validation = before.validation | validation
        else:
            validation = dict.fromkeys(before.validation, product_of(Path(), [])) | validation
    return Manifest(
        text=products["text"],
        text_spec=expected.text_spec,
        text_identity=text_identity,
        latents=latents,
        latent_spec=expected.latent_spec,
        conditioning=conditioning,
        conditioning_specs=specs,
        validation=validation,
        buckets=expected.buckets,
        held_out=expected.held_out,
        captions=captions_digest(_sidecars(cache / "latents", expected.products["latents"])),
        num_skipped=num_skipped,
        made_by=expected.made_by,
    )


def _products(cache: Path, expected: ExpectedCache) -> tuple[dict[str, Product], int]:
    """Return the manifest's entries by folder, and how many source rows were left out."""
    skipped_rows: set[str] = set()

    def noting_skipped(sidecars: Iterator[Sidecar]) -> Iterator[Sidecar]:
        for each in sidecars:
            skipped_rows.update(skipped.row for skipped in each.skipped)
            yield each

    products = {
        folder: product_of(
            cache / folder,
            noting_skipped(_sidecars(cache / folder, product)),
            product.shard_buckets,
        )
        for folder, product in expected.products.items()
    }
    return products, len(skipped_rows)


def _sidecars(folder: Path, product: ExpectedProduct) -> Iterator[Sidecar]:
    """Yield a product's sidecars, one at a time, since together they may fill the memory."""
    for shard in range(len(product.fingerprints)):
        found = sidecar.load(folder, shard)
        if found is None:
            raise ShardError(f"{folder}: shard {shard:06d} vanished while it was counted")
        yield found
