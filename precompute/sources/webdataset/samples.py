"""The samples of one tar, in compact arrays: ten million members fit into memory."""

import json
from array import array
from collections import Counter
from typing import Any

from precompute.sources.source import Kind
from precompute.sources.webdataset.tar_headers import Member
from precompute.sources.webdataset.wanted import IN_WORDS, ROLES, Role, Wanted

KINDS: tuple[Kind, ...] = ("image", "conditioning_image")
# Kinds of endings that are counted; all further ones are counted as one.
MOST_ENDINGS = 1000


class Texts:
    """Many texts, one after the other in memory."""

    def __init__(self) -> None:
        self.data, self.ends = bytearray(), array("q", [0])

    def add(self, text: str) -> None:
        """Add a text."""
        self.data += text.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.data))

    def __getitem__(self, number: int) -> str:
        """Return a text."""
        data = self.data[self.ends[number] : self.ends[number + 1]]
        return data.decode("utf-8", "surrogateescape")


class Spans:
    """Where the images of one kind lie in a tar, and what their names end in."""

    def __init__(self) -> None:
        self.offsets, self.sizes, self.endings = array("q"), array("q"), array("H")
        self.known_endings: list[str] = []

    def add(self, member: Member | None, ending: str) -> None:
        """Add the image of the next sample; None if it has none."""
        if ending not in self.known_endings:  # the few that a role may have
            self.known_endings.append(ending)
        self.offsets.append(0 if member is None else member.offset)
        self.sizes.append(0 if member is None else member.size)
        self.endings.append(self.known_endings.index(ending))


class Tally:
    """Members of a tar, counted by ending.

    Attributes:
        endings: how many there are, by ending in lower case.
        first: the name of the first of each ending.
    """

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, name: str, ending: str) -> None:
        """Count a member."""
        ending = ending.lower()
        if ending not in self.endings and len(self.endings) >= MOST_ENDINGS:
            ending = "…"
        self.endings[ending] += 1
        self.first.setdefault(ending, name)


class Samples:
    """The samples of one tar, by number.

    Args:
        tar: the tar's name in messages.
        wanted: which members are read.

    Attributes:
        faults: why a sample as a whole cannot be used, by number.
        no_captions: why a sample has no caption, by number.
        members: all members of samples.
        unread: those of them with endings that nobody asked for.
        no_members: names that are no member of a sample: links, or without an ending.
        num_again: how many samples have the key of an earlier one.
    """

    def __init__(self, tar: str, wanted: Wanted) -> None:
        self.tar, self.wanted = tar, wanted
        self.faults: dict[int, str] = {}
        self.no_captions: dict[int, str] = {}
        self.members, self.unread = Tally(), Tally()
        self.no_members: list[str] = []
        self.num_again = 0
        self.keys, self._captions = Texts(), Texts()
        self._spans: dict[Kind, Spans] = {kind: Spans() for kind in KINDS}
        self.roles = bytearray()  # of each sample, a bit for each role that it has
        self._numbers: array[int] | None = None  # what is left, where some were dropped

    def add(self, key: str, found: dict[Role, tuple[Member, str]], caption: Any = None) -> None:
        """Add a sample.

        Args:
            key: its key.
            found: the member of each role that it has, and the member's ending.
            caption: its caption, as found.
        """
        for kind, spans in self._spans.items():
            spans.add(*found.get(kind, (None, "")))
        self._captions.add(json.dumps(caption))
        self.keys.add(key)
        self.roles.append(sum(1 << ROLES.index(role) for role in found))

    def keep(self, numbers: list[int]) -> None:
        """Drop all samples but these."""
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.roles) if self._numbers is None else len(self._numbers)

    def _number(self, at: int) -> int:
        return at if self._numbers is None else self._numbers[at]

    def caption(self, at: int) -> Any:
        """Return the caption of a sample, as found; None if it has none."""
        return json.loads(self._captions[self._number(at)])

    def fault(self, at: int) -> str:
        """Return why a sample cannot be used; empty if nothing is known."""
        number = self._number(at)
        return self.faults.get(number) or self.no_captions.get(number, "")

    def name(self, at: int, kind: Kind) -> str:
        """Return the name of a sample's image, with its tar's; empty if it has none."""
        number, spans = self._number(at), self._spans[kind]
        if not spans.offsets[number]:
            return ""
        ending = spans.known_endings[spans.endings[number]]
        return f"{self.tar}/{self.keys[number]}.{ending}"

    def span(self, at: int, kind: Kind) -> tuple[int, int]:
        """Return offset and size of a sample's image in the tar.

        Raises:
            OSError: the sample has none.
        """
        number, spans = self._number(at), self._spans[kind]
        if not spans.offsets[number]:
            member = f"{self.keys[number]}{self.wanted.in_words(kind)}"
            raise OSError(f"no {IN_WORDS[kind]}: {self.tar} has no member {member}")
        return spans.offsets[number], spans.sizes[number]

    def count(self, role: Role) -> int:
        """Return how many samples have a member of a role."""
        bit = 1 << ROLES.index(role)
        return sum(bool(roles & bit) for roles in self.roles)
