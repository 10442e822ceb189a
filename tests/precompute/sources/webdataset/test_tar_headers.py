"""Where the members of a tar lie, and tars that are not whole."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from precompute.sources.webdataset.tar_headers import DamagedTar, Member, members
from tests.precompute.sources.webdataset.conftest import samples, write_tar

LONG = "a folder with a long name/" * 9
NAMES = ["0.jpg", "deep/er/0.png", "ünï ☃.jpg", "x" * 120 + ".txt", f"{LONG}0.txt", "./1.jpg"]


def of_tarfile(path: Path) -> list[Member]:
    """Return the plain files of a tar as the standard library finds them."""
    with tarfile.open(path) as tar:
        return [Member(one.name, one.offset_data, one.size) for one in tar if one.isreg()]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1_700_000_000, 1.5])
def test_members_are_those_that_tarfile_finds(tmp_path: Path, form: int, mtime: float) -> None:
    path = tmp_path / "a.tar"
    names = [name for name in NAMES if form != tarfile.USTAR_FORMAT or len(name) < 100]
    with tarfile.open(path, "w", format=form) as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 300 * number, mtime
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    found = list(members(path))
    assert [one.name for one in found] == names
    assert found == of_tarfile(path)


def test_folders_links_and_global_headers_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "made by hand"}) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("f", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "f" if kind == tarfile.SYMTYPE else ""
            tar.addfile(member)
    assert [(one.name, one.kind) for one in members(path)] == [
        ("d", "folder"),
        ("l", "other"),
        ("f", "file"),
    ]


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(range(3))).read_bytes()
    end = max(one.offset + one.size for one in members(tmp_path / "whole.tar"))
    cut = tmp_path / "cut.tar"
    for num_bytes in (*range(0, end, 256), end):
        cut.write_bytes(whole[:num_bytes])
        with pytest.raises(DamagedTar, match=r"is cut|no (tar )?header at byte \d+"):
            list(members(cut))
    cut.write_bytes(whole[: end - end % 512 + 1024])  # with one block of zeros, at least
    assert len(list(members(cut))) == 9


def test_a_damaged_header_is_no_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(range(3)), format=tarfile.GNU_FORMAT)
    third = list(members(path))[2]
    header = third.offset - 512
    for at in (header, header + 124, header + 150):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.with_name("b.tar").write_bytes(data)
        with pytest.raises(DamagedTar, match=f"no tar header at byte {header} "):
            list(members(path.with_name("b.tar")))


def test_two_tars_in_one_file_are_not_one(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(range(2)))
    path.write_bytes(2 * path.read_bytes())
    with pytest.raises(DamagedTar, match=r"ends at byte \d+, and there is more after that"):
        list(members(path))


def test_other_files_are_no_tars(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(range(2)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DamagedTar, match="is compressed with gzip; unpack it"):
        list(members(path))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 30)
    with pytest.raises(DamagedTar, match="is no tar: no header at byte 0"):
        list(members(path))
