"""The inventory: digests of the images and captions of a source's rows.

It holds arrays and no object per row, so that ten million rows fit into a laptop's memory.

Axes: N rows, P captions.
"""

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from common.progress import Progress
from precompute.fingerprints.digest_cache import OPAQUE, TRANSPARENT, Content, DigestCache
from precompute.planning.layout import Ids, Numbers
from precompute.sources.patient_read import read_patiently
from precompute.sources.source import Kind, Row, Source, printable
from sd3 import images
from sd3.images import BadImage
from shards.format.sidecar import LARGEST_CAPTIONS

HASHING_THREADS = 8
CHUNK_ROWS = 1024
NO_CONTENT = Content(bytes(16))
# Caches know a bad row by the digest of its fault, as it was worded at first.
FORMER_WORDING = {
    "no caption": "the prompt is not text but NoneType",
    "no image": "the row has no image",
    "no conditioning image": "the row has no conditioning image",
}


@dataclass(frozen=True)
class Inventory:
    """The chosen rows of a source; a row's number in here is not its index in the source.

    Attributes:
        rows: index of each row in the source, [N].
        images: digest of each image's bytes, or of why the row cannot be used, [N, 2].
        conditionings: digest of each conditioning image's bytes, or of why it cannot be used,
            [N, 2]; equal to `images` where conditioning images are drawn from the images.
        sizes: width and height of each image, in pixels, [N, 2]; 0 where there is no image.
        transparent: whether each image, and its conditioning image, may have transparent pixels,
            [N, 2]; False throughout where it was not asked for.
        captions: digests of the captions, row by row, [P, 2]; a row that cannot be used has none.
        caption_ends: number of each row's first caption, and P at the end, [N + 1].
        faults: why a row cannot be used, as far as is known without decoding, by its number.
        conditioning_faults: why a row's conditioning image cannot be used, by its number.
    """

    rows: Numbers
    images: Ids
    conditionings: Ids
    sizes: NDArray[np.int32]
    transparent: NDArray[np.bool_]
    captions: Ids
    caption_ends: Numbers
    faults: dict[int, str]
    conditioning_faults: dict[int, str]

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)


def choose_rows(num_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    """Return at most `limit` of a source's rows, in their order.

    The choice is random and nested: a higher limit chooses these rows and more.
    """
    if limit is None or limit >= num_rows:
        return range(num_rows)
    random_ranks = np.fromiter(
        (xxh3_64_intdigest(b"%d" % row, seed=seed) for row in range(num_rows)), "u8"
    )
    return [int(row) for row in np.sort(np.argsort(random_ranks, kind="stable")[:limit])]


def take_inventory(
    source: Source,
    rows: Sequence[int],
    digests: DigestCache,
    *,
    conditioning: bool,
    transparency: bool,
) -> Inventory:
    """Read and hash the images and captions of rows, except images whose digest is known.

    Args:
        source: the data set.
        rows: indices of the rows to take, ascending.
        digests: digests of files that were hashed before; new ones are added.
        conditioning: whether the source's conditioning images are read.
        transparency: whether it matters which images have transparent pixels.

    Raises:
        RunError: the source's disk fails again and again.
    """
    builder = _InventoryBuilder()
    with (
        _ImageHasher(source, digests, transparency) as hasher,
        Progress(len(rows), "row", "reading") as bar,
    ):
        for start in range(0, len(rows), CHUNK_ROWS):
            indices = rows[start : start + CHUNK_ROWS]
            contents = hasher.contents(indices, "image")
            controls = hasher.contents(indices, "conditioning_image") if conditioning else contents
            for row, image, control in zip(source.rows(indices), contents, controls, strict=True):
                builder.add(row, image, control)
            bar.update(len(indices))
        digests.save()
    return builder.inventory(rows)


class _ImageHasher:
    """Hashes images in threads, unless their digests are known.

    The first image to be hashed takes the lock, so that workers of one disk do not all hash it.
    """

    def __init__(self, source: Source, digests: DigestCache, transparency: bool) -> None:
        self.source = source
        self.transparency = transparency
        self.digests = digests
        self.resources = contextlib.ExitStack()
        self.has_lock = False

    def __enter__(self) -> "_ImageHasher":
        self.pool = self.resources.enter_context(ThreadPoolExecutor(HASHING_THREADS, "hash"))
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()

    def contents(self, indices: Sequence[int], kind: Kind) -> list[Content | str]:
        """Return the content of each row's image, or why it cannot be read."""
        versions = [self.source.version(index, kind) for index in indices]
        known = self._known(versions)
        if None in known and any(versions) and not self.has_lock:
            self.resources.enter_context(self.digests.hashing_lock())
            self.has_lock = True
            known = self._known(versions)  # another worker may have hashed them meanwhile
        unknown = [at for at, content in enumerate(known) if content is None]
        hashed = self.pool.map(lambda at: _read_content(self.source, indices[at], kind), unknown)
        contents: list[Content | str] = [content or "" for content in known]
        for at, content in zip(unknown, hashed, strict=True):
            contents[at] = content
            if isinstance(content, Content):
                self.digests.add(versions[at], content)
        return contents

    def _known(self, versions: Sequence[bytes | None]) -> list[Content | None]:
        """Return the contents that are known, as far as it matters."""
        return [
            None if content and self.transparency and not content.transparency else content
            for content in self.digests.find(versions)
        ]


class _InventoryBuilder:
    """The columns of an inventory, which grow row by row."""

    def __init__(self) -> None:
        self.images, self.conditionings, self.captions = bytearray(), bytearray(), bytearray()
        self.sizes = array("i")
        self.transparent = bytearray()
        self.ends = array("q", [0])
        self.faults: dict[int, str] = {}
        self.conditioning_faults: dict[int, str] = {}

    def add(self, row: Row, image: Content | str, control: Content | str) -> None:
        """Add a row.

        Args:
            row: the row.
            image: content of its image, or why it cannot be read.
            control: content of its conditioning image, or why it cannot be read.
        """
        number = len(self.ends) - 1
        captions, fault = _hash_captions(row)
        known_by = fault
        if not fault and isinstance(image, str):
            fault = f"{printable(row.image)}: {image}" if row.image else image
            known_by = f"{row.image}: {image}" if row.image else image
        if fault:
            self.faults[number] = fault
            captions = b""
        elif isinstance(control, str):
            name = printable(row.conditioning_image)
            self.conditioning_faults[number] = f"{name}: {control}" if name else control
        content = NO_CONTENT if isinstance(image, str) else image
        self.images += _fault_digest(known_by) if fault else content.digest
        if isinstance(control, str):
            self.conditionings += _fault_digest(control)
        else:
            self.conditionings += control.digest
        self.sizes.extend((content.width, content.height))
        for each in (image, control):
            transparent = isinstance(each, Content) and each.transparency == TRANSPARENT
            self.transparent.append(transparent)
        self.captions += captions
        self.ends.append(len(self.captions) // 16)

    def inventory(self, rows: Sequence[int]) -> Inventory:
        """Return the inventory of all added rows."""
        return Inventory(
            rows=np.asarray(rows, np.int64),
            images=_digests(self.images),
            conditionings=_digests(self.conditionings),
            sizes=np.frombuffer(self.sizes, np.int32).reshape(-1, 2),
            transparent=np.frombuffer(self.transparent, bool).reshape(-1, 2),
            captions=_digests(self.captions),
            caption_ends=np.frombuffer(self.ends, np.int64),
            faults=self.faults,
            conditioning_faults=self.conditioning_faults,
        )


def digest_hex(digest: Any) -> str:
    """Return one digest of an inventory in hexadecimal, as xxhash writes it."""
    return f"{int(digest[0]):016x}{int(digest[1]):016x}"


def prompt_digest(prompt: str) -> bytes:
    """Return the digest of a prompt, 16 bytes."""
    return xxh3_128_digest(prompt.encode())


def digests_of(prompts: Iterator[str]) -> Ids:
    """Return the digests of prompts, [P, 2]."""
    return _digests(b"".join(map(prompt_digest, prompts)))


def _digests(data: bytes | bytearray) -> Ids:
    return np.frombuffer(data, ">u8").reshape(-1, 2).astype(np.uint64)


def _fault_digest(fault: str) -> bytes:
    wording = FORMER_WORDING.get(fault.partition(":")[0], fault)
    return xxh3_128_digest(b"cannot be used: " + wording.encode(errors="backslashreplace"))


def _hash_captions(row: Row) -> tuple[bytes, str]:
    """Return the digests of a row's captions, or why the row cannot be used."""
    prompts = row.prompts
    if row.fault or prompts == [None]:
        return b"", row.fault or "no caption"
    if not 1 <= len(prompts) <= LARGEST_CAPTIONS:
        return b"", f"{len(prompts)} captions, 1 to {LARGEST_CAPTIONS} expected"
    try:
        return b"".join(map(prompt_digest, prompts)), ""
    except AttributeError:
        wrong = next(prompt for prompt in prompts if not isinstance(prompt, str))
        return b"", f"the prompt is not text but {type(wrong).__name__}"
    except UnicodeEncodeError:
        return b"", "the prompt is not valid text: half of a surrogate pair"


def _read_content(source: Source, index: int, kind: Kind) -> Content | str:
    """Return the content of a row's image, or why it cannot be read."""
    try:
        data = read_patiently(source, index, kind)
    except OSError as error:
        return error.strerror or str(error)
    width, height = 0, 0
    with contextlib.suppress(BadImage):
        width, height = images.size(data)
    transparency = TRANSPARENT if images.has_transparency(data) else OPAQUE
    return Content(xxh3_128_digest(data), width, height, transparency)
