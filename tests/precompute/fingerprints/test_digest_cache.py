"""DigestCache digests: found again, never for another version, and never in the way."""

import fcntl
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import locks
from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import ENTRIES, Content, DigestCache
from precompute.planning import prepare
from precompute.sources.caches import HASHES


def version(number: int) -> bytes:
    return ((number << 64) + number**2).to_bytes(16, "big")


def content(number: int) -> Content:
    return Content(bytes(reversed(version(number))), number, 2 * number)


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "hashes.npy"
    digests = DigestCache(path)
    numbers = [5, 1, 2**30]
    for number in numbers:
        digests.add(version(number), content(number))
    digests.add(None, content(7))
    # Two of which the first halves are those of others.
    strangers = [version(5)[:8] + bytes(8), version(1)[:8] + b"\xff" * 8, bytes(16), b"\xff" * 16]
    asked = [*map(version, numbers), *strangers]
    expected = [*map(content, numbers), None, None, None, None]
    assert digests.find([*asked, None]) == [*expected, None]
    digests.save()
    assert DigestCache(path).find([*asked, None]) == [*expected, None]
    later = DigestCache(path)
    later.add(version(3), content(3))
    later.add(version(5), content(6))
    later.save()
    found = DigestCache(path).find([version(1), version(3), version(5)])
    assert found == [content(1), content(3), content(6)]
    entries = np.load(path, allow_pickle=False)
    assert (len(entries), entries.itemsize) == (4, 42)


def test_saving_takes_a_twentieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    saved_at: list[float] = []

    def merge(_: DigestCache) -> None:
        nonlocal now
        saved_at.append(now)
        now += 30  # as long as writing some hundred million entries

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(DigestCache, "_merge", merge)
    digests = DigestCache(tmp_path / "hashes.npy")
    while now < 2000:
        now += 1
        digests.add(version(1), content(1))
    # The first after a minute; each then 20 times 30 seconds after the end of the one before.
    assert saved_at == [61, 61 + 30 + 601, 61 + 2 * (30 + 601), 61 + 3 * (30 + 601)]


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    path = tmp_path / "hashes.npy"
    for damaged in (b"", b"nothing", b"\x93NUMPY\x01\x00garbage", b"\x93NUMPY" + bytes(200)):
        path.write_bytes(damaged)
        digests = DigestCache(path)
        assert digests.find([version(1)]) == [None]
    digests.add(version(1), content(1))
    digests.save()
    assert DigestCache(path).find([version(1)]) == [content(1)]


def test_one_content_is_forgotten_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "hashes.npy"
    digests = DigestCache(path)
    for number in range(5):
        digests.add(version(number), content(number))
    digests.save()
    digests.forget(version(3))
    digests.forget(version(7))
    digests.forget(None)
    expected = [None if number == 3 else content(number) for number in range(5)]
    for each in (digests, DigestCache(path)):
        assert each.find([version(number) for number in range(5)]) == expected


def test_what_another_worker_has_saved_meanwhile_stays(tmp_path: Path) -> None:
    first, second = (DigestCache(tmp_path / "hashes.npy") for _ in range(2))
    for number, worker in enumerate((first, second)):
        worker.add(version(number), content(number))
        worker.save()
    assert DigestCache(first.path).find([version(0), version(1)]) == [content(0), content(1)]


def test_without_keep_nothing_is_written(tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "cache" / "hashes.npy", keep=False)
    with digests.hashing_lock():
        digests.add(version(1), content(1))
    digests.save()
    assert list(tmp_path.iterdir()) == []


def _hash_once(path: Path, counter: Path) -> None:
    digests = DigestCache(path)
    with digests.hashing_lock():
        if digests.find([version(1)]) == [None]:
            with counter.open("a") as file:
                file.write("hashed\n")
            time.sleep(0.05)
            digests.add(version(1), content(1))
            digests.save()


@pytest.mark.slow
def test_workers_of_one_disk_hash_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "hashes.npy", tmp_path / "counter")
    workers = [context.Process(target=_hash_once, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert (tmp_path / "counter").read_text() == "hashed\n"


@pytest.mark.parametrize(("entry", "num_bytes"), zip(ENTRIES[:-1], (40, 41), strict=True))
def test_what_a_former_version_has_kept_is_found(
    entry: np.dtype, num_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "hashes.npy"
    digests = DigestCache(path)
    digests.add(version(1), content(1))
    digests.save()
    np.save(path, np.load(path)[list(entry.names or ())].astype(entry))
    assert np.load(path).itemsize == num_bytes
    former = DigestCache(path)
    assert former.find([version(1)]) == [content(1)]
    known = content(2)._replace(transparency=2, profile=1)
    former.add(version(2), known)
    former.save()
    assert DigestCache(path).find([version(1), version(2)])[1] == known


def test_what_is_at_fault_is_not_kept(tmp_path: Path) -> None:
    digests = DigestCache(tmp_path / "hashes.npy")
    digests.add(version(1), content(1)._replace(fault="a package is missing"))
    digests.add(version(2), content(2))
    assert digests.find([version(1), version(2)]) == [None, content(2)]


def test_one_process_at_a_time_reads_the_weights(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(fresh, validation_prompt=(), validation_image=())
    path = config.cache / HASHES
    original = prepare.find_identities
    seen: list[str] = []

    def watched(*arguments: Any) -> Any:
        digests = arguments[-1]
        held = path.with_name(f"{path.name}.lock")
        with held.open("r+") as file, pytest.raises(BlockingIOError):
            locks.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What the process that held the lock before has found is there.
        seen.append(str(digests.find([version(1)])))
        digests.add(version(2), content(2))
        return original(*arguments)

    def taken(*arguments: Any, **named: Any) -> Any:
        seen.append(str(DigestCache(path).find([version(2)])))  # saved before it goes on
        return inventory(*arguments, **named)

    inventory = prepare.take_inventory
    monkeypatch.setattr(prepare, "find_identities", watched)
    monkeypatch.setattr(prepare, "take_inventory", taken)
    other = DigestCache(path)
    other.add(version(1), content(1))
    other.save()
    prepare.prepare(config)
    assert seen == [str([content(1)]), str([content(2)])]


def _prepare(config: PrecomputeConfig, read: Path, start: Barrier) -> None:
    """Prepare a run in a process of its own; note the weights that are read."""
    original = Path.open

    def noting(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.suffix == ".safetensors":
            with original(read, "a") as file:
                file.write(f"{path.parent.name}\n")
            time.sleep(0.2)
        return original(path, *arguments, **named)

    Path.open = noting  # type: ignore[assignment, method-assign]
    start.wait()
    prepare.prepare(config)


@pytest.mark.slow
def test_two_processes_read_the_weights_once(fresh: PrecomputeConfig, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (fresh, tmp_path / "read", context.Barrier(2))
    workers = [context.Process(target=_prepare, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    read = sorted((tmp_path / "read").read_text().split())
    assert read == ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
