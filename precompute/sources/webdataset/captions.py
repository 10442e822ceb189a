"""Captions in members of a tar: plain text, or a field of a JSON object."""

import json
from typing import Any

from precompute.sources.webdataset.wanted import Alternative


class NoCaption(ValueError):
    """A member holds no caption: says why."""


def read_caption(data: bytes, alternative: Alternative) -> Any:
    """Return the caption in a member's bytes: a text, or whatever a JSON field holds.

    Args:
        data: of the member.
        alternative: how the member was found.

    Raises:
        NoCaption: no UTF-8, no JSON, or no such field.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NoCaption(f"is no UTF-8 text (byte {error.start})") from error
    if alternative.ending.rpartition(".")[2] != "json":
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoCaption(f"is not JSON ({error})") from error
    if not alternative.field and isinstance(found, dict):
        fields = ", ".join(name for name, value in found.items() if isinstance(value, str))
        raise NoCaption(
            f"holds an object: name a field, e.g. json.caption; of text it has {fields}"
        )
    for name in filter(None, alternative.field.split(".")):
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        raise NoCaption(f"has no field {alternative.field!r}")
    return found
