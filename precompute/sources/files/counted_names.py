"""Names that are counted, and the first few of them, for remarks on what is not read."""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, field

from precompute.sources.source import printable
from precompute.sources.splits import LONGEST_LIST, first_few


@dataclass
class CountedNames:
    """Names of files.

    Attributes:
        count: how many there are.
        first: the first of them.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, folder: str, names: Sequence[str]) -> None:
        """Count files of a folder."""
        self.count += len(names)
        room = LONGEST_LIST + 1 - len(self.first)
        self.first += [printable(posixpath.join(folder, name)) for name in names[:room]]

    def remark(self, text: str) -> list[str]:
        """Return a line that says how many there are of what, none if there are none."""
        return [f"{text}: {self.count} ({first_few(self.first)})"] if self.count else []
