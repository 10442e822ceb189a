"""The columns of a table that hold images and captions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError
from precompute.sources.source import SourceSettings

FILE_NAME = "file_name"
METADATA_HINT = (
    "An image folder's captions and conditioning images stand in metadata.jsonl beside the images, "
    'a line each: {"file_name": "0.png", "conditioning_image_file_name": "…", "text": "…"}.'
)


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Attributes:
        image: bytes or file names.
        conditioning_image: bytes or file names; None where they are not needed.
        caption: text or lists of text; None where one caption is for all.
    """

    image: str
    conditioning_image: str | None
    caption: str | None


def image_columns(names: Iterable[str]) -> dict[str, str]:
    """Return a table's columns, by the names that an image folder's tables have for them.

    There `file_name` is the column `image`, and `edges_file_name` is `edges`.
    """
    known = list(names)
    found = {name: name for name in known}
    for name in known:
        if name == FILE_NAME or name.endswith(f"_{FILE_NAME}"):
            short = name.removesuffix(FILE_NAME).removesuffix("_") or "image"
            if short not in known:
                found[short] = found.pop(name)
    return found


def find_columns(types: Mapping[str, Any], settings: SourceSettings, where: str) -> Columns:
    """Return the columns that the settings name.

    Args:
        types: the Arrow types of a table's columns, by name.
        settings: which name the columns.
        where: the data set as the user gave it, for errors.

    Raises:
        ConfigError: a column is missing, or no column of images.
    """
    wanted = {
        "image_column": _holds_images,
        "conditioning_image_column": _holds_images,
        "caption_column": _holds_text,
    }
    if not settings.wants_conditioning:
        del wanted["conditioning_image_column"]
    if settings.caption is not None:
        del wanted["caption_column"]
    named = [getattr(settings, option) for option in wanted]
    for option, holds in wanted.items():
        name, flag = getattr(settings, option), f"--{option.replace('_', '-')}"
        if name not in types:
            obvious = _holds_bytes if holds is _holds_images else _holds_text
            others = [
                other
                for other in types
                if other not in named and not other.startswith("__") and obvious(types[other])
            ]
            hint = f"Did you mean {flag} {others[0]}?" if len(others) == 1 else f"Name it: {flag}."
            if not any(map(_holds_text, types.values())):
                hint = METADATA_HINT
            raise ConfigError(f"{where}: no column {name!r}; it has {', '.join(types)}. {hint}")
        if holds is _holds_images and not (holds(types[name]) or _holds_nothing(types[name])):
            raise ConfigError(
                f"{where}: column {name!r} holds {types[name]}; {flag} needs images or file names."
            )
    conditioning = settings.conditioning_image_column if settings.wants_conditioning else None
    caption = settings.caption_column if settings.caption is None else None
    return Columns(settings.image_column, conditioning, caption)


def lacks(what: str, column: str | None) -> str:
    """Return why a row without an image or a caption cannot be used.

    Args:
        what: that it lacks, e.g. "caption".
        column: in which nothing stands.
    """
    return f"no {what}: nothing in column {column!r}"


def _holds_images(type_: Any) -> bool:
    """Tell whether an Arrow type can be an image: bytes, a file name, or both."""
    from pyarrow import types

    return bool(_holds_bytes(type_) or types.is_string(type_) or types.is_large_string(type_))


def _holds_nothing(type_: Any) -> bool:
    """Tell whether an Arrow type is that of a column in which nothing stands: all rows are bad."""
    from pyarrow import types

    return bool(types.is_null(type_))


def _holds_bytes(type_: Any) -> bool:
    from pyarrow import types

    if types.is_struct(type_):
        return {type_.field(at).name for at in range(type_.num_fields)} <= {"bytes", "path"}
    return bool(types.is_binary(type_) or types.is_large_binary(type_))


def _holds_text(type_: Any) -> bool:
    """Tell whether an Arrow type can be a caption, or a list of captions."""
    from pyarrow import types

    if types.is_list(type_) or types.is_large_list(type_):
        type_ = type_.value_type
    return bool(types.is_string(type_) or types.is_large_string(type_))
