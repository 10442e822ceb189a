"""The index of a cache's samples, samples.parquet: image, control and prompts joined, a row each.

Any reader of Parquet finds by it what belongs together, without our code. A row is a conditioning
record of one control; an image with two controls has two rows.
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, chain
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from common.atomic_files import atomic_file
from common.errors import ShardError
from common.prefetch import prefetch
from shards.format import sidecar
from shards.format.manifest import SAMPLES, Manifest, conditioning_folder
from shards.format.product import IndexFile, file_sha256
from shards.format.published.json_members import read_json_members
from shards.format.published.prompt_table import PLACE, PromptTable
from shards.format.sidecar import Sidecar, tar_path

SHARDS_AT_A_TIME = 8
ROWS_A_GROUP = 1 << 16
BYTES_A_GROUP = 1 << 26
SCHEMA = pa.schema(
    [
        ("control", pa.string()),
        ("key", pa.string()),
        ("image_hash", pa.string()),
        ("mirrored", pa.bool_()),
        ("held_out", pa.bool_()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        *(
            (f"{record}_{name}", kind)
            for record in ("latent", "conditioning")
            for name, kind in (
                ("file", pa.string()),
                ("row", pa.int32()),
                ("offset", pa.int64()),
                ("size", pa.int64()),
            )
        ),
        ("prompts", pa.list_(PLACE)),
    ]
)


class _Image(msgspec.Struct):
    """What a latent's JSON says of its image."""

    image_hash: str | None = None
    mirrored: bool = False


class _Text(msgspec.Struct):
    """What a text record's JSON says."""

    prompt: str


def write(
    cache: Path, manifest: Manifest, after_shard: Callable[[], None] = lambda: None
) -> IndexFile:
    """Write, or replace, the index of a cache whose shards are all there.

    The JSON of each image and of each prompt is read from the tars. At most some row groups and 40
    bytes a prompt are in memory.

    Args:
        cache: its folder.
        manifest: of the cache; its `samples` is not looked at.
        after_shard: called after each shard of text or of latents.

    Returns:
        The manifest's entry.

    Raises:
        ShardError: a record is damaged, or refers to one that is not there.
        OSError: a file cannot be read or written.
    """
    path = cache / SAMPLES
    num_rows = 0
    with (
        ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool,
        tempfile.TemporaryFile() as words,
        atomic_file(path) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        prompts = PromptTable(_texts(pool, cache, manifest, after_shard), words)
        for table in _row_groups(_shards(pool, cache, manifest, prompts, after_shard)):
            writer.write_table(table, row_group_size=len(table))
            num_rows += len(table)
    return IndexFile(num_rows, path.stat().st_size, file_sha256(path))


def is_there(cache: Path, listed: IndexFile) -> bool:
    """Tell whether a cache has the index that its manifest lists, byte for byte."""
    path = cache / SAMPLES
    return path.is_file() and file_sha256(path) == listed.sha256


def _texts(
    pool: ThreadPoolExecutor, cache: Path, manifest: Manifest, after_shard: Callable[[], None]
) -> Iterator[tuple[Sidecar, list[str]]]:
    """Yield sidecar and prompts of each text shard."""
    folder = cache / "text"

    def read(shard: int) -> tuple[Sidecar, list[str]]:
        found = sidecar.load_present(folder, shard)
        return found, [each.prompt for each in read_json_members(folder, found, _Text)]

    for each in prefetch(pool, read, range(manifest.text.num_shards), SHARDS_AT_A_TIME):
        yield each
        after_shard()


def _shards(
    pool: ThreadPoolExecutor,
    cache: Path,
    manifest: Manifest,
    prompts: PromptTable,
    after_shard: Callable[[], None],
) -> Iterator[pa.Table]:
    """Yield the rows of each shard, of one control after the other."""
    held_out = set(manifest.held_out)

    def read(shard: int) -> tuple[Sidecar, list[_Image], dict[str, Sidecar]]:
        latents = sidecar.load_present(cache / "latents", shard)
        controls = {
            name: sidecar.load_present(cache / conditioning_folder(name), shard)
            for name in manifest.conditioning
        }
        return latents, read_json_members(cache / "latents", latents, _Image), controls

    shards = range(manifest.latents.num_shards)
    for latents, images, controls in prefetch(pool, read, shards, SHARDS_AT_A_TIME):
        grid = manifest.buckets[manifest.latents.shard_buckets[latents.shard]]
        size_px = [cells * manifest.latent_spec.vae_scale_factor for cells in grid]
        common = _images(latents, images, prompts)
        for name, control in controls.items():
            rows = _rows_of(control.keys, latents, name)
            count = len(rows)
            columns = {
                "control": pa.repeat(name, count),
                "held_out": pa.repeat(latents.shard in held_out, count),
                "height": pa.repeat(pa.scalar(size_px[0], pa.int32()), count),
                "width": pa.repeat(pa.scalar(size_px[1], pa.int32()), count),
                **{each: common[each].take(pa.array(rows, pa.int64())) for each in common},
                **_places("conditioning", conditioning_folder(name), control),
            }
            yield pa.table([columns[each] for each in SCHEMA.names], SCHEMA)
        after_shard()


def _images(latents: Sidecar, images: list[_Image], prompts: PromptTable) -> dict[str, pa.Array]:
    """Return the columns that all controls of a shard have in common, a row a latent."""
    keys = latents.prompts or [[]] * latents.num_records
    ends = pa.array(accumulate(map(len, keys), initial=0), pa.int32())
    return {
        "key": pa.array(latents.keys, pa.string()),
        "image_hash": pa.array([image.image_hash for image in images], pa.string()),
        "mirrored": pa.array([image.mirrored for image in images], pa.bool_()),
        **_places("latent", "latents", latents),
        "prompts": pa.ListArray.from_arrays(ends, prompts.places([*chain.from_iterable(keys)])),
    }


def _places(record: str, folder: str, found: Sidecar) -> dict[str, pa.Array]:
    """Return where the tensors of a shard's records lie."""
    file = tar_path(Path(folder), found.shard).as_posix()
    return {
        f"{record}_file": pa.repeat(file, found.num_records),
        f"{record}_row": pa.array(range(found.num_records), pa.int32()),
        f"{record}_offset": pa.array([span[0] for span in found.spans], pa.int64()),
        f"{record}_size": pa.array([span[1] for span in found.spans], pa.int64()),
    }


def _rows_of(keys: list[str], latents: Sidecar, control: str) -> list[int]:
    """Return which of a shard's latents keys name.

    Raises:
        ShardError: none; naming the key.
    """
    rows = {key: row for row, key in enumerate(latents.keys)}
    for key in keys:
        if key not in rows:
            raise ShardError(f"latents: the image {key} of {control} is missing; run shards verify")
    return [rows[key] for key in keys]


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Put small tables together, as Parquet wants it, without much in memory at a time."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= ROWS_A_GROUP or sum(t.nbytes for t in group) >= BYTES_A_GROUP:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)
