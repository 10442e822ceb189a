"""Things that are counted, and the first few of them named."""

import itertools

import pytest

from precompute.sources.counted import Counted, first_few


@pytest.mark.parametrize(
    ("count", "named"), [(0, ""), (1, "0"), (3, "0, 1, 2"), (4, "0, 1, 2, …"), (5, "0, 1, 2, …")]
)
def test_the_lowest_are_named_in_whatever_order_they_come(count: int, named: str) -> None:
    for order in itertools.permutations(range(count)):
        rows = Counted[int]()
        for row in order:
            rows.add([row])
        assert (rows.count, rows.named()) == (count, named)
        assert rows.named(lambda row: "abc"[row]) == named.translate(str.maketrans("012", "abc"))


def test_a_remark_is_made_of_what_there_is() -> None:
    files = Counted[str]()
    assert files.remark("not read") == []
    files.add(["b c ", "a\n"])
    assert files.remark("not read") == [r"not read: 2 ('a\n', 'b c ')"]


def test_of_a_list_the_first_are_named_as_they_stand() -> None:
    assert first_few(["b", "a", "c"]) == "b, a, c"
    assert first_few(["b", "a", "c", "d"]) == "b, a, c, …"
