"""The JSON members of a shard, read from its tar without the tensors between them."""

import os
from pathlib import Path
from typing import TypeVar

import msgspec
from xxhash import xxh3_64_hexdigest

from common.errors import ShardError
from shards.format.sidecar import Sidecar, tar_path

T = TypeVar("T")


def read_json_members(folder: Path, sidecar: Sidecar, kind: type[T]) -> list[T]:
    """Return what the JSON of each record of a shard says.

    Args:
        folder: the product's.
        sidecar: of the shard.
        kind: a type of msgspec; what it does not name is passed over.

    Raises:
        ShardError: a member is damaged or not of this kind.
        OSError: the tar cannot be read.
    """
    path = tar_path(folder, sidecar.shard)
    decoder = msgspec.json.Decoder(kind)
    members = []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for key, (_, _, start, size), checksums in zip(
            sidecar.keys, sidecar.spans, sidecar.checksums, strict=True
        ):
            data = os.pread(descriptor, size, start)
            if xxh3_64_hexdigest(data) != checksums[16:]:
                raise ShardError(f"{path}: record {key}: its JSON is damaged; run shards verify")
            try:
                members.append(decoder.decode(data))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ShardError(f"{path}: record {key}: {error}; run shards verify") from error
    finally:
        os.close(descriptor)
    return members
