"""Things that are counted, and of which the first few are named."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from precompute.sources.source import printable

if TYPE_CHECKING:
    from _typeshed import SupportsRichComparison

Thing = TypeVar("Thing", bound="SupportsRichComparison")
MOST_NAMED = 3


def first_few(names: Sequence[str], count: int | None = None) -> str:
    """Return the first names of a list, and a mark if there are more.

    Args:
        names: the list.
        count: how many there are, if the list itself holds only the first of them.
    """
    more = (len(names) if count is None else count) > MOST_NAMED
    return ", ".join([*map(printable, names[:MOST_NAMED]), *(["…"] if more else [])])


def remark(text: str, names: Sequence[str], count: int | None = None) -> list[str]:
    """Return a line that says how many there are of what, none if there are none.

    Args:
        text: what they are.
        names: of all, or of the first.
        count: how many there are, if the list itself holds only the first of them.
    """
    number = len(names) if count is None else count
    return [f"{text}: {number} ({first_few(names, count)})"] if number else []


@dataclass
class Counted(Generic[Thing]):
    """Names, or numbers of rows, which may come in any order.

    Attributes:
        count: how many there are.
        first: the lowest of them.
    """

    count: int = 0
    first: list[Thing] = field(default_factory=list)

    def add(self, things: Collection[Thing]) -> None:
        """Count things."""
        self.count += len(things)
        self.first = sorted([*self.first, *things])[:MOST_NAMED]

    def named(self, name: Callable[[Thing], str] = str) -> str:
        """Return the first of them by name, and a mark if there are more."""
        return first_few([name(one) for one in self.first], self.count)

    def remark(self, text: str) -> list[str]:
        """Return a line that says how many there are of what, none if there are none."""
        return remark(text, list(map(str, self.first)), self.count)
