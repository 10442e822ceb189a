"""The faults that `make mutate` plants fit the code as it is."""

import ast

import pytest

from tests.mutation.table import REPOSITORY, Area, Fault, read_areas

AREAS = read_areas()


@pytest.mark.parametrize("name", AREAS)
def test_each_fault_stands_once_and_is_python(name: str) -> None:
    area = AREAS[name]
    for fault in area.fault:
        source = (REPOSITORY / fault.file).read_text(encoding="utf-8")
        planted = fault.planted(source)
        assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source)), fault.what


@pytest.mark.parametrize("name", AREAS)
def test_no_slow_tests_and_no_twins(name: str) -> None:
    area: Area = AREAS[name]
    assert all((REPOSITORY / test.partition("::")[0]).exists() for test in area.tests)
    edits = [(fault.file, fault.old, fault.new) for fault in area.fault]
    assert len(set(edits)) == len(edits)


def test_a_fault_that_no_longer_fits_says_so() -> None:
    fault = Fault(file="a.py", what="wrong", old="x", new="y")
    with pytest.raises(ValueError, match="stands there 2 times, not once"):
        fault.planted("x = x")
