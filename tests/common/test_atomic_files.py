"""Files that are there whole or not at all."""

import errno
from pathlib import Path

import pytest

from common.atomic_files import atomic_file


def write_half(path: Path, error: BaseException) -> None:
    with atomic_file(path) as file:
        file.write(b"half of the new")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_what_could_not_be_written_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"the earlier")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the earlier"
