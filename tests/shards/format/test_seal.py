"""Sealing: two at once, and after one that was killed."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards import verify
from shards.format import manifest, seal
from shards.format.expected_cache import ExpectedCache, read_expected


def another_control(cache: Path, name: str) -> ExpectedCache:
    """Add a copy of the control to a cache, as if just made; return what its maker expects."""
    for kind in ("conditioning", "validation"):
        shutil.copytree(cache / kind / "conditioning", cache / kind / name)
    expected, _ = read_expected(cache)
    products = {
        folder.replace("/conditioning", f"/{name}"): product
        for folder, product in expected.products.items()
    }
    return replace(expected, products=products, conditioning_name=name)


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_two_controls_that_are_sealed_at_once_are_both_there(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    makers = [another_control(copy, name) for name in ("canny", "depth")]
    write = manifest.write

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)  # both have read what is there before either writes
        write(*arguments)

    monkeypatch.setattr(manifest, "write", slowly)
    threads = [threading.Thread(target=seal.seal, args=(copy, maker)) for maker in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(manifest.load(copy).conditioning) == ["canny", "conditioning", "depth"]
    assert sorted(manifest.load(copy).validation) == ["canny", "conditioning", "depth"]
    assert all(not faults for _, faults in verify.faults(copy))
    assert not list(copy.glob("*.tmp-*"))


def test_one_that_was_killed_keeps_nobody_from_sealing(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seal, "ABANDONED_AFTER_S", 0.1)
    (copy / seal.CLAIM).touch()
    seal.seal(copy, another_control(copy, "canny"))
    assert sorted(manifest.load(copy).conditioning) == ["canny", "conditioning"]
    assert not (copy / seal.CLAIM).exists()


def test_a_sealed_cache_is_left_alone(copy: Path) -> None:
    expected, _ = read_expected(copy)
    before = copy.stat().st_mtime_ns  # changes when a file is made, renamed or removed in it
    assert seal.seal(copy, expected) == manifest.load(copy)
    assert copy.stat().st_mtime_ns == before
