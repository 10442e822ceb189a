"""The inventory: digests of the images and captions of a source's rows.

It holds arrays and no object per row, so that ten million rows fit into a laptop's memory.

Axes: N rows, P captions.
"""

import contextlib
import itertools
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from common.progress import Progress
from precompute.fingerprints.digest_cache import NO, YES, Content, DigestCache
from precompute.planning.layout import Ids, Numbers
from precompute.sources.counted import Counted
from precompute.sources.patient_read import read_patiently
from precompute.sources.source import Kind, Row, Source, printable
from sd3.image_files import read_header
from sd3.images import OTHER_SHAPE_TAKEN, has_shape_of, shape_fault
from shards.format.sidecar import LARGEST_CAPTIONS

HASHING_THREADS = 8
CHUNK_ROWS = 1024
# So many looks at files tell whether the others are worth threads.
TRIAL_LOOKS, SLOW_LOOK_S = 16, 100e-6
NO_CONTENT = Content(bytes(16))
# Caches know a bad row by the digest of its fault, as it was worded at first.
FORMER_WORDING = {
    "no caption": "the prompt is not text but NoneType",
    "no image": "the row has no image",
    "no conditioning image": "the row has no conditioning image",
    "the caption is not UTF-8": "the prompt is not valid text: half of a surrogate pair",
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
        has_profile: whether each image has a colour profile that changes its colours, [N].
        other_shape: whether each conditioning image has another shape than its image, and is used
            all the same, [N].
        captions: digests of the captions, row by row, [P, 2]; a row with a fault has none.
        caption_ends: number of each row's first caption, and P at the end, [N + 1].
        faults: why a row cannot be used, where its image or captions are missing, by its number.
        conditioning_faults: the same of a row's conditioning image.
        unreadable: why a row's images cannot be decoded, by its number. Only headers are known, so
            its files and captions are planned as any, and left out when they are decoded.
        rounded: rows whose conditioning image has an aspect ratio that rounding has changed.
        too_small: rows whose image is smaller than was asked for, by their index in the source;
            they are not in here.
    """

    rows: Numbers
    images: Ids
    conditionings: Ids
    sizes: NDArray[np.int32]
    transparent: NDArray[np.bool_]
    has_profile: NDArray[np.bool_]
    other_shape: NDArray[np.bool_]
    captions: Ids
    caption_ends: Numbers
    faults: dict[int, str]
    conditioning_faults: dict[int, str]
    unreadable: dict[int, str] = field(default_factory=dict)
    rounded: Counted[int] = field(default_factory=Counted)
    too_small: Counted[int] = field(default_factory=Counted)

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
    floats: bool = False,
    any_shape: bool = False,
    min_image_px: int = 1,
) -> Inventory:
    """Read and hash the images and captions of rows, except images whose digest is known.

    Args:
        source: the data set.
        rows: indices of the rows to take, ascending.
        digests: digests of files that were hashed before; new ones are added.
        conditioning: whether the source's conditioning images are read.
        transparency: whether it matters which images have transparent pixels.
        floats: whether conditioning images may hold floating point numbers.
        any_shape: whether conditioning images may have another shape than their images.
        min_image_px: rows whose image has a shorter side than this, in pixels, are not taken.

    Raises:
        RunError: the source's disk fails again and again.
    """
    builder = _InventoryBuilder(min_image_px, any_shape)
    with (
        _ImageHasher(source, digests, transparency, floats) as hasher,
        Progress(len(rows), "row", "reading") as bar,
    ):
        for start in range(0, len(rows), CHUNK_ROWS):
            indices = rows[start : start + CHUNK_ROWS]
            contents = hasher.contents(indices, "image")
            controls = hasher.contents(indices, "conditioning_image") if conditioning else contents
            for found in zip(indices, source.rows(indices), contents, controls, strict=True):
                builder.add(*found)
            bar.update(len(indices))
        digests.save()
    return builder.inventory()


class _ImageHasher:
    """Hashes images in threads, unless their digests are known.

    The first image to be hashed takes the lock, so that workers of one disk do not all hash it.
    """

    def __init__(
        self, source: Source, digests: DigestCache, transparency: bool, floats: bool
    ) -> None:
        self.source = source
        self.transparency = transparency
        self.floats = floats
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
        versions = self._versions(indices, kind)
        known = self._known(versions)
        if None in known and any(versions) and not self.has_lock:
            self.resources.enter_context(self.digests.hashing_lock())
            self.has_lock = True
            known = self._known(versions)  # another worker may have hashed them meanwhile
        unknown = [at for at, content in enumerate(known) if content is None]
        floats = self.floats and kind == "conditioning_image"
        hashed = self.pool.map(
            lambda at: _read_content(self.source, indices[at], kind, floats), unknown
        )
        contents: list[Content | str] = [content or "" for content in known]
        for at, content in zip(unknown, hashed, strict=True):
            contents[at] = content
            if isinstance(content, Content):
                self.digests.add(versions[at], content)
        return contents

    def _versions(self, indices: Sequence[int], kind: Kind) -> list[bytes | None]:
        """Return the version of each row's image.

        On a network's disk a look at a file takes long, so that threads share them; on a local one
        it takes microseconds, and threads would only wait for each other.
        """

        def look(part: Sequence[int]) -> list[bytes | None]:
            return [self.source.version(index, kind) for index in part]

        first, rest = indices[:TRIAL_LOOKS], indices[TRIAL_LOOKS:]
        start = time.perf_counter()
        found = look(first)
        if time.perf_counter() - start < SLOW_LOOK_S * len(first):
            return found + look(rest)
        size = max(1, -(-len(rest) // HASHING_THREADS))
        parts = [rest[at : at + size] for at in range(0, len(rest), size)]
        return found + list(itertools.chain.from_iterable(self.pool.map(look, parts)))

    def _known(self, versions: Sequence[bytes | None]) -> list[Content | None]:
        """Return the contents that are known, as far as it matters."""
        return [
            content
            if content and content.profile and (content.transparency or not self.transparency)
            else None
            for content in self.digests.find(versions)
        ]


class _InventoryBuilder:
    """The columns of an inventory, which grow row by row."""

    def __init__(self, min_image_px: int, any_shape: bool) -> None:
        self.min_image_px, self.any_shape = min_image_px, any_shape
        self.rows = array("q")
        self.images, self.conditionings, self.captions = bytearray(), bytearray(), bytearray()
        self.sizes = array("i")
        self.transparent, self.has_profile = bytearray(), bytearray()
        self.other_shape = bytearray()
        self.ends = array("q", [0])
        self.faults: dict[int, str] = {}
        self.conditioning_faults: dict[int, str] = {}
        self.unreadable: dict[int, str] = {}
        self.rounded, self.too_small = Counted[int](), Counted[int]()

    def add(self, index: int, row: Row, image: Content | str, control: Content | str) -> None:
        """Add a row, unless its image is too small.

        Args:
            index: of the row in the source.
            row: the row.
            image: content of its image, or why it cannot be read.
            control: content of its conditioning image, or why it cannot be read.
        """
        content = NO_CONTENT if isinstance(image, str) else image
        if 0 < min(content.width, content.height) < self.min_image_px:
            self.too_small.add([index])
            return
        number = len(self.rows)
        self.rows.append(index)
        other_shape = False
        captions, fault = _hash_captions(row)
        known_by = fault
        if not fault and isinstance(image, str):
            fault = _named(row.image, image)
            known_by = f"{row.image}: {image}" if row.image else image
        if fault:
            self.faults[number] = fault
            captions = b""
        elif isinstance(control, str):
            self.conditioning_faults[number] = _named(row.conditioning_image, control)
        elif isinstance(image, Content):
            other_shape = self._compare(number, row, image, control)
        self.images += _fault_digest(known_by) if fault else content.digest
        if isinstance(control, str):
            self.conditionings += _fault_digest(control)
        else:
            self.conditionings += control.digest
        self.sizes.extend((content.width, content.height))
        for each in (image, control):
            self.transparent.append(isinstance(each, Content) and each.transparency == YES)
        self.has_profile.append(content.profile == YES)
        self.other_shape.append(other_shape)
        self.captions += captions
        self.ends.append(len(self.captions) // 16)

    def _compare(self, number: int, row: Row, image: Content, control: Content) -> bool:
        """Note what the headers of a row's two images say against it.

        Returns:
            Whether they have two shapes, and are used all the same.
        """
        if image.fault:
            self.unreadable[number] = _named(row.image, image.fault)
            return False
        size, like = (control.width, control.height), (image.width, image.height)
        other_shape = ""
        if size != like and not control.fault and all((*size, *like)):
            other_shape = shape_fault(size, like)
            if not other_shape and not has_shape_of(size, like):
                self.rounded.add([number])
        if other_shape and self.any_shape:
            return True
        if fault := control.fault or (other_shape and other_shape + OTHER_SHAPE_TAKEN):
            self.unreadable[number] = _named(row.conditioning_image, fault)
        return False

    def inventory(self) -> Inventory:
        """Return the inventory of all added rows."""
        return Inventory(
            rows=np.frombuffer(self.rows, np.int64),
            images=_digests(self.images),
            conditionings=_digests(self.conditionings),
            sizes=np.frombuffer(self.sizes, np.int32).reshape(-1, 2),
            transparent=np.frombuffer(self.transparent, bool).reshape(-1, 2),
            has_profile=np.frombuffer(self.has_profile, bool),
            other_shape=np.frombuffer(self.other_shape, bool),
            captions=_digests(self.captions),
            caption_ends=np.frombuffer(self.ends, np.int64),
            faults=self.faults,
            conditioning_faults=self.conditioning_faults,
            unreadable=self.unreadable,
            rounded=self.rounded,
            too_small=self.too_small,
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


def _named(file: str, reason: str) -> str:
    return f"{printable(file)}: {reason}" if file else reason


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


def _read_content(source: Source, index: int, kind: Kind, floats: bool) -> Content | str:
    """Return the content of a row's image, or why it cannot be read."""
    try:
        data = read_patiently(source, index, kind)
    except OSError as error:
        return error.strerror or str(error)
    header = read_header(data, takes_floats=floats)
    return Content(
        xxh3_128_digest(data),
        header.width,
        header.height,
        YES if header.is_transparent else NO,
        YES if header.has_profile else NO,
        header.fault,
    )
