"""Which members of a sample are its image, its conditioning image and its caption.

A column is one ending, or several of which the first that a sample has is taken, as webdataset
writes them: `jpg;png`. A caption may be a field of a JSON member: `json.caption`.
"""

import re
from dataclasses import dataclass
from typing import Literal

from precompute.sources.source import SourceSettings

Role = Literal["image", "conditioning_image", "caption"]
ROLES: tuple[Role, ...] = ("image", "conditioning_image", "caption")
IN_WORDS: dict[Role, str] = {
    "image": "image",
    "conditioning_image": "conditioning image",
    "caption": "caption",
}
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "avif")
# What is looked for where the user names no column.
USUAL: dict[Role, tuple[str, ...]] = {
    "image": (*IMAGES, "image"),
    "conditioning_image": (
        *(f"{name}.{image}" for name in ("conditioning_image", "conditioning") for image in IMAGES),
        "conditioning_image",
    ),
    "caption": ("txt", "caption", "text", "json.caption"),
}
LONGEST_LIST = 4
JSON_FIELD = re.compile(r"((?:.*\.)?json)\.(.+)", re.IGNORECASE)


@dataclass(frozen=True)
class Alternative:
    """One way to find a member.

    Attributes:
        ending: of its name, in lower case.
        field: of the JSON object in it, dots between names; empty where it is not JSON.
    """

    ending: str
    field: str = ""


@dataclass(frozen=True)
class Wanted:
    """Which members are wanted.

    Attributes:
        columns: the columns as they are named on the command line; what is not wanted is missing.
        alternatives: for each role the ways to find its member, the first that is there.
        is_named: whether the user named the column, for each role.
    """

    columns: dict[Role, str]
    alternatives: dict[Role, tuple[Alternative, ...]]
    is_named: dict[Role, bool]

    def of_ending(self, ending: str) -> tuple[tuple[Role, int], ...]:
        """Return the roles that a member with an ending may have, and how late in its list."""
        return tuple(
            (role, rank)
            for role, alternatives in self.alternatives.items()
            for rank, one in enumerate(alternatives)
            if one.ending == ending.lower()
        )

    def in_words(self, role: Role) -> str:
        """Return what a role's members end in, for messages: `.jpg;png`."""
        endings = self.columns[role].split(";")
        more = ";…" if len(endings) > LONGEST_LIST else ""
        return f".{';'.join(endings[:LONGEST_LIST])}{more}"


def flag_of(role: Role) -> str:
    """Return the option that names a role's column."""
    return f"--{role.replace('_', '-')}-column"


def wanted_members(settings: SourceSettings) -> Wanted:
    """Return which members the settings want."""
    given: dict[Role, str] = {
        "image": settings.image_column,
        "conditioning_image": settings.conditioning_image_column,
        "caption": settings.caption_column,
    }
    if not settings.wants_conditioning:
        del given["conditioning_image"]
    if settings.caption is not None:  # one for all
        del given["caption"]
    defaults = SourceSettings()
    is_named = {
        role: column != getattr(defaults, f"{role}_column") for role, column in given.items()
    }
    named = {
        one.ending
        for role, column in given.items()
        if is_named[role]
        for one in _parse(column, role)
    }
    columns: dict[Role, str] = {}
    for role, column in given.items():
        usual = (one for one in USUAL[role] if _parse(one, role)[0].ending not in named)
        columns[role] = column if is_named[role] else ";".join(usual)
    alternatives = {role: _parse(column, role) for role, column in columns.items()}
    return Wanted(columns, alternatives, is_named)


def _parse(column: str, role: Role) -> tuple[Alternative, ...]:
    parts = [part.strip().lstrip(".") for part in column.split(";")]
    found = []
    for part in filter(None, parts):
        in_json = JSON_FIELD.fullmatch(part) if role == "caption" else None
        ending, field = in_json.groups() if in_json else (part, "")
        found.append(Alternative(ending.lower(), field))
    return tuple(found)
