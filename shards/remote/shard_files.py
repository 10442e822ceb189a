"""The files of a cache's shards, as its manifest lists them, and a loop over them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.errors import ConfigError, ShardError
from common.prefetch import prefetch
from shards.format.manifest import Manifest
from shards.format.product import file_sha256
from shards.format.sidecar import sidecar_path, tar_path

SHARDS_AT_A_TIME = 4


@dataclass(frozen=True)
class ShardFiles:
    """A shard's two files as a manifest lists them; paths are relative to the cache."""

    tar: str
    tar_bytes: int
    tar_sha256: str
    sidecar: str
    sidecar_sha256: str

    def check(self, cache: Path) -> None:
        """Read a cache's own files.

        Raises:
            ShardError: they are not those that the manifest lists.
        """
        for name, sha256 in ((self.tar, self.tar_sha256), (self.sidecar, self.sidecar_sha256)):
            if not matches(cache / name, sha256):
                raise ShardError(f"{cache / name}: damaged or changed; run shards verify")


@dataclass(frozen=True)
class TransferResult:
    """What a transfer did.

    Attributes:
        copied: number of shards that were copied.
        unchanged: number of shards that were there already.
        num_bytes: size of the copied tars.
    """

    copied: int
    unchanged: int
    num_bytes: int


def for_each_shard(
    label: str,
    manifest: Manifest,
    copy: Callable[[ShardFiles], bool],
    *,
    give_up: Callable[[], None],
    copied: Callable[[ShardFiles], None] = lambda _: None,
) -> TransferResult:
    """Call `copy` for all shards, some at a time.

    Args:
        label: of the progress bar.
        manifest: lists the shards.
        copy: copies a shard if that is necessary and returns whether; called in several threads.
        give_up: ends the copying in other threads after an error.
        copied: called in order for the shards that `copy` returned True for.
    """
    shards = _all_shards(manifest)
    num_copied, num_bytes = 0, 0
    total = sum(files.tar_bytes for files in shards)
    with (
        ThreadPoolExecutor(SHARDS_AT_A_TIME) as pool,
        tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            results = prefetch(pool, copy, shards, lead=SHARDS_AT_A_TIME)
            for files, was_copied in zip(shards, results, strict=True):
                if was_copied:
                    copied(files)
                    num_copied += 1
                    num_bytes += files.tar_bytes
                bar.update(files.tar_bytes)
        except BaseException:
            give_up()  # otherwise the other threads try again for minutes
            raise
    return TransferResult(num_copied, len(shards) - num_copied, num_bytes)


def matches(path: Path, sha256: str, size: int | None = None) -> bool:
    """Tell whether a file is there with these bytes."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return file_sha256(path) == sha256


def require_overwrite(overwrite: bool, where: object, what: str = "another complete cache") -> None:
    """Refuse to change another cache unless that was asked for.

    Raises:
        ConfigError: it was not.
    """
    if not overwrite:
        raise ConfigError(f"{where}: holds {what}; --overwrite replaces in it what differs.")


def _all_shards(manifest: Manifest) -> list[ShardFiles]:
    return [
        ShardFiles(
            tar_path(Path(folder), shard).as_posix(),
            product.shard_bytes[shard],
            product.shard_sha256[shard],
            sidecar_path(Path(folder), shard).as_posix(),
            product.sidecar_sha256[shard],
        )
        for folder, product in manifest.products()
        for shard in range(product.num_shards)
    ]
