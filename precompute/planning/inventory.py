"""The inventory: the rows of a source by the digests of what they name.

Ten million rows fit a laptop's memory: arrays, never an object a row. Axes: N rows, P captions.
"""

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from precompute.planning.digest_cache import Content, DigestCache
from precompute.planning.layout import Ids, Numbers
from precompute.sources.source import Kind, Row, Source, printable
from sd3 import images
from sd3.images import BadImage
from shards.format.sidecar import LARGEST_CAPTIONS

HASHING_THREADS = 8
CHUNK_ROWS = 1024
NO_CONTENT = Content(bytes(16))


@dataclass(frozen=True)
class Inventory:
    """What the chosen rows of a source are.

    Attributes:
        rows: their indices in the source, [N].
        images: digest of each image's bytes, or of why the row cannot be used, [N, 2].
        conditionings: likewise of each conditioning image, [N, 2]; of the image where conditioning
            images are drawn from it.
        sizes: width and height of each image, in pixels, [N, 2]; 0 where it has none.
        captions: digests of the captions, row by row, [P, 2]; a row that cannot be used has none.
        caption_ends: where each row's captions begin, and P, [N + 1].
        faults: why a row cannot be used, as far as reading it shows, by its number in here.
        conditioning_faults: why its conditioning image cannot be used, likewise.
    """

    rows: Numbers
    images: Ids
    conditionings: Ids
    sizes: NDArray[np.int32]
    captions: Ids
    caption_ends: Numbers
    faults: dict[int, str]
    conditioning_faults: dict[int, str]

    def __len__(self) -> int:
        """Return N."""
        return len(self.rows)


def chosen(num_rows: int, limit: int | None, seed: int) -> Sequence[int]:
    """Return at most `limit` of a source's rows, in their order.

    The choice is random and nested: with a higher limit these rows are among those chosen.
    """
    if limit is None or limit >= num_rows:
        return range(num_rows)
    lots = np.fromiter((xxh3_64_intdigest(b"%d" % at, seed=seed) for at in range(num_rows)), "u8")
    return [int(at) for at in np.sort(np.argsort(lots, kind="stable")[:limit])]


def take_inventory(
    source: Source, rows: Sequence[int], remembered: DigestCache, *, conditioning: bool
) -> Inventory:
    """Read and hash all that rows of a source name, but for what is remembered.

    Args:
        source: the data set.
        rows: indices of the rows to take, ascending.
        remembered: digests of files that were hashed before; learns those that are hashed now.
        conditioning: whether the source's conditioning images count.
    """
    found = _Growing()
    with (
        contextlib.ExitStack() as alone,
        ThreadPoolExecutor(HASHING_THREADS, "hash") as pool,
        tqdm(total=len(rows), unit="row", desc="reading", disable=None) as bar,
    ):

        def contents(indices: Sequence[int], kind: Kind) -> list[Content | str]:
            """Return each image's content, or why it has none."""
            versions = [source.version(index, kind) for index in indices]
            known = remembered.find(versions)
            if None in known and any(versions) and not alone_already:
                alone_already.append(True)
                alone.enter_context(remembered.hashing_alone())
                known = remembered.find(versions)  # another worker may have hashed them meanwhile
            missing = [at for at, content in enumerate(known) if content is None]
            hashed = pool.map(lambda at: _content(source, indices[at], kind), missing)
            result: list[Content | str] = [content or "" for content in known]
            for at, content in zip(missing, hashed, strict=True):
                result[at] = content
                if isinstance(content, Content):
                    remembered.add(versions[at], content)
            return result

        alone_already: list[bool] = []
        for start in range(0, len(rows), CHUNK_ROWS):
            indices = rows[start : start + CHUNK_ROWS]
            pictures = contents(indices, "image")
            controls = contents(indices, "conditioning_image") if conditioning else pictures
            for row, picture, control in zip(source.rows(indices), pictures, controls, strict=True):
                found.add(row, picture, control, conditioning=conditioning)
            bar.update(len(indices))
        remembered.save()
    return found.inventory(rows)


class _Growing:
    """The columns of an inventory while it is taken."""

    def __init__(self) -> None:
        self.images, self.conditionings, self.captions = bytearray(), bytearray(), bytearray()
        self.sizes = array("i")
        self.ends = array("q", [0])
        self.faults: dict[int, str] = {}
        self.conditioning_faults: dict[int, str] = {}

    def add(
        self, row: Row, picture: Content | str, control: Content | str, *, conditioning: bool
    ) -> None:
        """Add a row with what was found of its image and its conditioning image."""
        number = len(self.ends) - 1
        captions, fault = _captions(row)
        if not fault and isinstance(picture, str):
            fault = f"{printable(row.image)}: {picture}" if row.image else picture
        if fault:
            self.faults[number] = fault
            captions = b""
        elif isinstance(control, str):
            name = printable(row.conditioning_image)
            self.conditioning_faults[number] = f"{name}: {control}" if name else control
        image = NO_CONTENT if isinstance(picture, str) else picture
        self.images += _fault_digest(fault) if fault else image.digest
        if isinstance(control, str):
            self.conditionings += _fault_digest(control)
        else:
            self.conditionings += control.digest
        self.sizes.extend((image.width, image.height))
        self.captions += captions
        self.ends.append(len(self.captions) // 16)

    def inventory(self, rows: Sequence[int]) -> Inventory:
        """Return what was added."""
        return Inventory(
            rows=np.asarray(rows, np.int64),
            images=_digests(self.images),
            conditionings=_digests(self.conditionings),
            sizes=np.frombuffer(self.sizes, np.int32).reshape(-1, 2),
            captions=_digests(self.captions),
            caption_ends=np.frombuffer(self.ends, np.int64),
            faults=self.faults,
            conditioning_faults=self.conditioning_faults,
        )


def digest_hex(digest: Any) -> str:
    """Return one digest of an inventory in hexadecimal, as xxhash gives it."""
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
    return xxh3_128_digest(b"cannot be used: " + fault.encode(errors="replace"))


def _captions(row: Row) -> tuple[bytes, str]:
    """Return the digests of a row's captions, or why they cannot be used."""
    prompts = row.prompts
    if not 1 <= len(prompts) <= LARGEST_CAPTIONS:
        return b"", f"{len(prompts)} captions, 1 to {LARGEST_CAPTIONS} expected"
    try:
        return b"".join(map(prompt_digest, prompts)), ""
    except AttributeError:
        wrong = next(prompt for prompt in prompts if not isinstance(prompt, str))
        return b"", f"the prompt is not text but {type(wrong).__name__}"
    except UnicodeEncodeError:
        return b"", "the prompt is not valid text: half of a surrogate pair"


def _content(source: Source, index: int, kind: Kind) -> Content | str:
    """Return what an image's bytes are, or why they cannot be read."""
    try:
        data = source.read(index, kind)
    except OSError as error:
        return error.strerror or str(error)
    width, height = 0, 0
    with contextlib.suppress(BadImage):
        width, height = images.size(data)
    return Content(xxh3_128_digest(data), width, height)
