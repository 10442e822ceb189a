"""Reading the cache's JSON files: strictly typed, of bounded size, and never code."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from common.errors import ShardError

T = TypeVar("T")
FORMAT_VERSION = 1
# A sidecar takes about 150 bytes a record, a manifest about 100 a shard.
LARGEST_FILE_BYTES = 1 << 26
# Up to 2^53, what every reader of JSON represents exactly.
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
# XXH3-128 or SHA-256, in hexadecimal.
Digest = Annotated[str, Meta(pattern=r"^([0-9a-f]{32}|[0-9a-f]{64})\Z")]


class _Version(msgspec.Struct):
    format_version: int


def digest(value: Any) -> str:
    """Return a short, stable digest of plain JSON values."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON values, without the fields of it that are None.

    So a field that came later changes no file that does not need it.
    """
    return dataclasses.asdict(
        value, dict_factory=lambda items: {key: item for key, item in items if item is not None}
    )


def read_file(path: Path) -> bytes:
    """Return the bytes of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        NotADirectoryError: its folder is a file.
        ShardError: it is not a regular file, cannot be read, or is larger than any file of a cache.
    """
    try:
        if path.exists() and not path.is_file():
            raise ShardError(f"{path}: not a file")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > LARGEST_FILE_BYTES:
        raise ShardError(f"{path}: damaged, over {LARGEST_FILE_BYTES >> 20} MB")
    return data


def decode(data: bytes, kind: type[T], where: object, remedy: str) -> T:
    """Return the dataclass that a JSON file holds; its annotations are checked.

    Args:
        data: the file's bytes.
        kind: a dataclass.
        where: the file's path or address, for the error.
        remedy: what to do about a damaged file.

    Raises:
        ShardError: another format version, no JSON, or not what the annotations say.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{where}: cache format {version}, this version reads {FORMAT_VERSION}; "
                "run precompute again, or install the version that wrote it"
            )
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(f"{where}: damaged ({error}); {remedy}") from error
