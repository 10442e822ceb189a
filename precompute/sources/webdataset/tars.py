"""WebDataset tars as a data set: the images are read from where they lie in the tars."""

import functools
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path, PurePath
from typing import IO

from common.errors import ConfigError, RunError
from common.progress import Progress
from precompute.sources.counted import first_few
from precompute.sources.file_versions import names_version, stat_version
from precompute.sources.source import Kind, Row, Source, SourceSettings
from precompute.sources.splits import files_of_split, left_out_remark
from precompute.sources.webdataset.grouping import read_samples
from precompute.sources.webdataset.remarks import refuse_useless, unread_remarks
from precompute.sources.webdataset.samples import Samples
from precompute.sources.webdataset.tar_headers import DamagedTar
from precompute.sources.webdataset.wanted import Wanted, wanted_members

INDEXING_THREADS = 8
NUM_OPEN_TARS = 64


class Tars:
    """The samples of several tars.

    Args:
        paths: of the tars.
        samples: of each tar.
        statuses: of each tar's file, before it was read.
        wanted: which members are read.
        remarks: on what is left out or not read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        samples: Sequence[Samples],
        statuses: Sequence[os.stat_result],
        wanted: Wanted,
        remarks: list[str],
    ) -> None:
        self.paths, self.samples, self.statuses = paths, samples, statuses
        self.has_conditioning_images = "conditioning_image" in wanted.columns
        self.layout = f"WebDataset, {len(paths)} {'tar' if len(paths) == 1 else 'tars'}"
        self.remarks = remarks
        self.ends = list(accumulate(map(len, samples)))
        # Of tars that changed just now, changes cannot be noticed.
        self.versions = [
            stat_version(status, os.path.abspath(path))  # noqa: PTH100
            for path, status in zip(paths, statuses, strict=True)
        ]
        # Files that no thread uses any more are closed as they are forgotten.
        self._open = functools.lru_cache(NUM_OPEN_TARS)(self._open_unchanged)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.ends[-1]

    def rows(self, indices: Sequence[int]) -> Iterator[Row]:
        """Yield the rows with these indices."""
        for index in indices:
            number, at = self._find(index)
            samples = self.samples[number]
            yield Row(
                f"row {index}",
                samples.name(at, "image"),
                samples.name(at, "conditioning_image"),
                samples.caption(at),
                samples.fault(at),
            )

    def read(self, index: int, kind: Kind) -> bytes:
        """Return the bytes of a row's image.

        Raises:
            OSError: the sample has no such member, or the tar cannot be read.
            RunError: the tar was changed.
        """
        number, at = self._find(index)
        offset, size = self.samples[number].span(at, kind)
        descriptor = self._open(number).fileno()
        parts = []
        while size > 0 and (part := os.pread(descriptor, size, offset)):  # 2 GiB at most at once
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size:
            raise self._changed(number)
        return b"".join(parts)

    def version(self, index: int, kind: Kind) -> bytes | None:
        """Return bytes that change when the image may have changed; None if nothing shows that."""
        number, at = self._find(index)
        version = self.versions[number]
        try:
            offset, size = self.samples[number].span(at, kind)
        except OSError:
            return None
        return None if version is None else names_version(version.hex(), offset, size)

    def _find(self, index: int) -> tuple[int, int]:
        """Return the number of a row's tar, and its sample's place in it."""
        number = bisect_right(self.ends, index)
        return number, index - (self.ends[number] - len(self.samples[number]))

    def _open_unchanged(self, number: int) -> IO[bytes]:
        file = self.paths[number].open("rb", buffering=0)
        now, before = os.fstat(file.fileno()), self.statuses[number]
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            file.close()
            raise self._changed(number)
        return file

    def _changed(self, number: int) -> RunError:
        return RunError(
            f"{self.paths[number]} was changed while precompute was running; run again, finished "
            "shards are kept"
        )


def open_tars(settings: SourceSettings, paths: Mapping[Path, PurePath], where: str) -> Source:
    """Return WebDataset tars as a data set.

    Args:
        settings: the columns and the split.
        paths: of the tars, in the order of the rows, and relative to the data set's folder.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: a tar is damaged or compressed, there is no such split or column, or no sample
            can be used.
    """
    wanted = wanted_members(settings)
    kept, left_out = files_of_split(paths, settings.split, where)
    statuses = [path.stat() for path in kept]
    samples = _index({path: str(paths[path]) for path in kept}, wanted, where)
    refuse_useless(samples, wanted, where)
    remarks = unread_remarks(samples)
    for split, files in left_out.items():
        others = _index({path: str(paths[path]) for path in files}, wanted, where)
        names = first_few([str(paths[path]) for path in files])
        remarks.append(f"{left_out_remark(sum(map(len, others)), split)} ({names})")
    return Tars(kept, samples, statuses, wanted, remarks)


def _index(tars: Mapping[Path, str], wanted: Wanted, where: str) -> list[Samples]:
    """Return the samples of each tar.

    Args:
        tars: paths, and the names in messages.
        wanted: which members are read.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: one is damaged or compressed, or cannot be read.
    """
    found: list[Samples] = []
    damaged: list[str] = []

    def index(path: Path) -> Samples | str:
        try:
            return read_samples(path, tars[path], wanted)
        except DamagedTar as error:
            return f"{tars[path]} {error}"
        except OSError as error:
            return f"{tars[path]}: {error.strerror or error}"

    with (
        ThreadPoolExecutor(INDEXING_THREADS, "index") as pool,
        Progress(len(tars), "tar", "indexing") as bar,
    ):
        for one in pool.map(index, tars):
            bar.update()
            if isinstance(one, str):
                damaged.append(one)
            else:
                found.append(one)
    if damaged:
        more = f" ({len(damaged)} of {len(tars)} tars are so)" if len(damaged) > 1 else ""
        raise ConfigError(f"{where}: {damaged[0]}.{more} Nothing was read; replace or remove it.")
    return found
