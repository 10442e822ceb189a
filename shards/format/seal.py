"""Sealing: from finished shards to a complete cache.

A process that finds every expected shard writes the manifest: a worker of stage 1, or
`python -m shards seal` after parts made on machines without a common disk were copied together.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from common import claim
from common.errors import ShardError
from shards.format import bad_rows, manifest, sidecar
from shards.format.expected_cache import ExpectedCache, ExpectedProduct
from shards.format.json_files import digest
from shards.format.manifest import SAMPLES, Manifest, conditioning_folder, validation_folder
from shards.format.product import Product, product_of, shard_captions_digest
from shards.format.published import dataset_card, samples
from shards.format.sidecar import Sidecar, Skipped
from shards.format.specs import AnnotatorSpec, ConditioningSpec

# Who made this file may change the manifest. It counts as a temporary file.
CLAIM = f"{manifest.MANIFEST}.tmp-0"
# The manifest is changed in a second or less; whoever writes an index renews the claim.
ABANDONED_AFTER_S = 20


def previous_manifest(cache: Path) -> Manifest | None:
    """Return the manifest of a cache as it was last complete, if it ever was."""
    for name in (manifest.MANIFEST, manifest.PREVIOUS):
        if (cache / name).is_file():
            with contextlib.suppress(ShardError):
                return manifest.load(cache, name)
    return None


def withdraw(cache: Path) -> None:
    """Make a complete cache an incomplete one, before its shards change.

    What its manifest says of other controls is needed when it is sealed again. The index of its
    samples goes.
    """
    with _alone(cache):
        with contextlib.suppress(FileNotFoundError):  # another worker was first
            (cache / manifest.MANIFEST).rename(cache / manifest.PREVIOUS)
        (cache / SAMPLES).unlink(missing_ok=True)


def seal(cache: Path, expected: ExpectedCache) -> Manifest:
    """Write the manifest of a cache whose shards are all there; return it.

    Other controls stay in it if they were made for these latents, and their validation pairs if
    their prompts were encoded as they are now; otherwise they must be made again.

    Raises:
        ShardError: shards are missing or differ from what is expected; naming them. Or too many
            rows were left out.
    """
    missing = expected.missing(cache)
    if missing:
        raise ShardError(f"{cache}: not complete; {expected.describe(missing)}")
    products, skipped, captions = _products(cache, expected)
    num_skipped = _num_skipped(expected, products, skipped)

    def with_controls_of(before: Manifest | None) -> Manifest:
        conditioning, specs, validation, annotators = _controls(expected, products, before)
        return Manifest(
            text=products["text"],
            text_spec=expected.text_spec,
            text_identity=digest(expected.products["text"].identity),
            latents=products["latents"],
            latent_spec=expected.latent_spec,
            conditioning=conditioning,
            conditioning_specs=specs,
            validation=validation,
            buckets=expected.buckets,
            held_out=expected.held_out,
            captions=captions,
            num_skipped=num_skipped,
            made_by=expected.made_by,
            annotators=annotators,
            samples=before.samples if before else None,
        )

    before = previous_manifest(cache)
    now = with_controls_of(before)
    if now == before and _is_sealed(cache, now):
        return now  # the disk may be read-only
    with _alone(cache):
        before = previous_manifest(cache)
        now = with_controls_of(before)
        if now != before or not _is_sealed(cache, now):
            now = _publish(cache, now)
        (cache / manifest.PREVIOUS).unlink(missing_ok=True)
    return now


def complete(cache: Path) -> Manifest:
    """Give a sealed cache what one of a former version lacks, or has lost: index and card.

    Raises:
        ShardError: the cache is not complete, or damaged.
    """
    with _alone(cache):
        found = manifest.load(cache)
        if found.samples is None or not samples.is_there(cache, found.samples):
            return _publish(cache, found)
        dataset_card.write(cache, found)
        return found


def _publish(cache: Path, now: Manifest) -> Manifest:
    """Write index, card and manifest; return the manifest."""
    index = samples.write(cache, now, after_shard=lambda: claim.renew(cache / CLAIM))
    now = replace(now, samples=index)
    dataset_card.write(cache, now)
    manifest.write(cache, now)
    return now


def _is_sealed(cache: Path, now: Manifest) -> bool:
    has_index = now.samples is None or (cache / SAMPLES).is_file()
    is_complete = (cache / manifest.MANIFEST).is_file()
    return is_complete and has_index and not (cache / manifest.PREVIOUS).exists()


def _alone(cache: Path) -> AbstractContextManager[None]:
    """Keep other processes from changing the manifest.

    Two that seal their controls at once would each leave out what the other adds.
    """
    return claim.alone(cache / CLAIM, ABANDONED_AFTER_S)


def _controls(
    expected: ExpectedCache, products: Mapping[str, Product], before: Manifest | None
) -> tuple[
    dict[str, Product], dict[str, ConditioningSpec], dict[str, Product], dict[str, AnnotatorSpec]
]:
    """Return conditioning, its specs, validation pairs and annotators, by the control's name."""
    name = expected.conditioning_name
    conditioning = {name: products[conditioning_folder(name)]}
    specs = {name: expected.conditioning_spec}
    validation = {name: products[validation_folder(name)]}
    annotators = {} if expected.annotator is None else {name: expected.annotator}
    if before and before.latents.fingerprint == products["latents"].fingerprint:
        conditioning = before.conditioning | conditioning
        specs = before.conditioning_specs | specs
        others = {other: spec for other, spec in before.annotators.items() if other != name}
        annotators = others | annotators
        if before.text_identity == digest(expected.products["text"].identity):
            validation = before.validation | validation
        else:
            validation = dict.fromkeys(before.validation, product_of(Path(), [])) | validation
    return conditioning, specs, validation, annotators


def _products(
    cache: Path, expected: ExpectedCache
) -> tuple[dict[str, Product], dict[str, Skipped], str]:
    """Return the manifest's entries by folder, the source rows left out, and `Manifest.captions`.

    Each sidecar is parsed once.
    """
    skipped: dict[str, Skipped] = {}
    captions: list[str] = []

    def noted(folder: str, product: ExpectedProduct) -> Iterator[Sidecar]:
        for each in _sidecars(cache / folder, product):
            skipped.update((one.row, one) for one in each.skipped)
            if folder == "latents":
                captions.append(shard_captions_digest(each))
            yield each

    products = {
        folder: product_of(cache / folder, noted(folder, product), product.shard_buckets)
        for folder, product in expected.products.items()
    }
    return products, skipped, digest(captions)


def _num_skipped(
    expected: ExpectedCache, products: Mapping[str, Product], skipped: Mapping[str, Skipped]
) -> int:
    """Return how many source rows were left out.

    Names do not tell: a row's line number may have moved between the making of two shards. What
    counts is how many records are missing.

    Raises:
        ShardError: more than are allowed.
    """
    if not expected.num_rows:  # a plan of a former version
        return len(skipped)
    records = products[conditioning_folder(expected.conditioning_name)].shard_records
    each, num_held_out, in_held_out = expected.images_per_row, expected.num_held_out, 0
    if each:
        in_held_out = sum(records[shard] for shard in expected.held_out)
    else:
        each, num_held_out = expected.num_images // expected.num_rows, 0
    planned = (expected.num_rows - num_held_out) * each
    count = _rows_that_lack(planned - (sum(records) - in_held_out), each)
    if num_held_out:
        planned = expected.num_images - planned
        count += _rows_that_lack(planned - in_held_out, planned // num_held_out)
    bound = (count, expected.num_rows, expected.max_bad_fraction)
    if bad_rows.too_many(*bound):
        raise bad_rows.refusal(*bound, list(skipped.values()))
    return count


def _rows_that_lack(num_missing: int, images_per_row: int) -> int:
    """Return of how many rows images are missing, at least."""
    return -(-num_missing // images_per_row)


def _sidecars(folder: Path, product: ExpectedProduct) -> Iterator[Sidecar]:
    """Yield a product's sidecars, one at a time, since together they may fill the memory."""
    for shard in range(len(product.fingerprints)):
        yield sidecar.load_present(folder, shard)
