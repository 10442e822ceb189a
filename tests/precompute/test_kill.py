"""Stage 1 killed or interrupted at any moment: the next run finishes it, to the same bytes."""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ShardError
from precompute.config import PrecomputeConfig
from shards.format import manifest
from shards.format.expected_cache import PLAN
from tests.conftest import REPOSITORY, flags, run_python

NUM_KILLS = 50
NUM_KILLS_OF_WORKERS = 30
KINDS = ("parts", "ranks", "machines")


def run_alone(config: PrecomputeConfig, environment: dict[str, str]) -> None:
    import torch

    from precompute.run import precompute

    os.environ |= environment
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    precompute(config)


def files(folder: Path) -> dict[str, bytes]:
    """Return name -> bytes of a cache's files, without what was left half-written.

    And without those that tell of the run, or of the source, rather than of the cache.
    """
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not re.search(r"\.tmp-|^run\.json|^hashes\.npy", path.name)
    }


def is_complete(folder: Path) -> bool:
    try:
        manifest.load(folder)
    except ShardError:
        return False
    return True


def shares(count: int, kind: str) -> list[tuple[str | None, dict[str, str]]]:
    """Return `--part` and the environment of so many workers that share a cache.

    Args:
        count: of workers.
        kind: `parts`, or `ranks` as `accelerate launch` gives them, or two `machines` with ranks on
            each where the count is even.
    """
    if kind == "parts":
        return [(f"{index}/{count}" if count > 1 else None, {}) for index in range(count)]
    machines = 2 if kind == "machines" and count % 2 == 0 else 1
    ranks = count // machines
    return [
        (
            f"{index // ranks}/{machines}" if machines > 1 else None,
            {"RANK": str(index % ranks), "WORLD_SIZE": str(ranks)},
        )
        for index in range(count)
    ]


class Workers:
    """Workers of one cache, each with its part."""

    def __init__(self, config: PrecomputeConfig) -> None:
        # Forked from a process that has imported everything and run nothing: a second a run.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            ["precompute.run", "demo.base_model.pipeline", "demo.base_model.vae"]
        )
        self.config = config
        self.processes: list[multiprocessing.process.BaseProcess] = []

    def start(self, count: int = 1, kind: str = "parts") -> None:
        """Start so many, and return when the first byte is written; see `shares`."""
        self.processes = [
            self.context.Process(
                target=run_alone, args=(replace(self.config, part=part), environment)
            )
            for part, environment in shares(count, kind)
        ]
        for process in self.processes:
            process.start()
        while not self.config.cache.exists() and self.processes[0].is_alive():
            time.sleep(0.001)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def finish(self, count: int = 1, kind: str = "parts") -> float:
        """Run to the end; return how long it took from the first byte on, in seconds."""
        self.start(count, kind)
        begun = time.monotonic()
        for process in self.processes:
            process.join()
            assert process.exitcode == 0
        return time.monotonic() - begun


def check_what_is_left(cache: Path, expected: dict[str, bytes], kill: int) -> bool:
    """What counts as finished is whole; return whether all of it is."""
    left = files(cache)
    complete = is_complete(cache)
    if complete:
        assert left == expected, f"kill {kill}: passes for complete"
    for name, data in left.items():
        if name.endswith(".json"):
            tar = name.replace(".json", ".tar")
            assert data == expected[name], f"kill {kill}: {name}"
            assert name == "manifest.json" or left[tar] == expected[tar], f"kill {kill}: {tar}"
    return complete


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment_it_is_finished_to_the_same_bytes(
    fresh: PrecomputeConfig, seed: int
) -> None:
    workers, cache = Workers(fresh), fresh.cache
    workers.finish()
    expected = files(cache)
    shutil.rmtree(cache)
    duration_s = workers.finish()
    assert files(cache) == expected

    rng = random.Random(seed)
    kill = unfinished = 0
    while kill < NUM_KILLS or unfinished <= NUM_KILLS / 2:
        kill += 1
        shutil.rmtree(cache)
        workers.start()
        time.sleep(rng.uniform(0, duration_s))
        workers.kill()
        # A run takes longer on a busy machine, and most kills are to find it at work.
        complete = check_what_is_left(cache, expected, kill)
        unfinished += not complete
        duration_s *= 0.95 if complete else 1.02
        workers.finish()
        assert files(cache) == expected, f"kill {kill}: other bytes"


@pytest.mark.slow
def test_many_workers_killed_again_and_again_end_at_the_same_bytes(
    fresh: PrecomputeConfig,
) -> None:
    workers, cache = Workers(fresh), fresh.cache
    workers.finish()
    expected = files(cache)
    shutil.rmtree(cache)
    duration_s = workers.finish()
    shutil.rmtree(cache)

    rng = random.Random(1)
    kill = resumed = 0
    while kill < NUM_KILLS_OF_WORKERS or resumed <= NUM_KILLS_OF_WORKERS / 3:
        kill += 1
        resumed += cache.exists()
        workers.start(rng.randint(1, 4), rng.choice(KINDS))
        time.sleep(rng.uniform(0, duration_s))
        workers.kill()
        complete = check_what_is_left(cache, expected, kill)
        duration_s *= 0.95 if complete else 1.02
        if complete:
            shutil.rmtree(cache)
    # Of what kills leave half-written, that goes in the end which is older than an hour.
    young, old = "000000000001", "000000000002"
    for name in ("text/000000.tar", "latents/000001.json", "hashes.npy", PLAN, manifest.MANIFEST):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        for path in (cache / f"{name}.tmp-{young}", cache / f"{name}.tmp-{old}"):
            path.write_bytes(b"half")
    hour_ago = time.time() - 3601
    for path in cache.rglob("*.tmp-*"):
        if not path.name.endswith(young):
            os.utime(path, (hour_ago, hour_ago))
    workers.finish(rng.randint(1, 4), rng.choice(KINDS))
    assert len(list(cache.rglob("*.tmp-*"))) == len(list(cache.rglob(f"*.tmp-{young}"))) == 5
    assert files(cache) == expected
    assert PLAN in expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_two_shards(
    fresh: PrecomputeConfig, cache: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "precompute", *flags(fresh)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    text = fresh.cache / "text"
    deadline = time.monotonic() + 120
    while not list(text.glob("*.tar*")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "ending after this shard; once more to end at once" in errors
    assert "ended between shards; the same command goes on from here" in output
    assert "Traceback" not in errors
    assert not list(fresh.cache.rglob("*.tmp-*"))
    tars = sorted(path.stem for path in fresh.cache.rglob("*.tar"))
    assert tars == sorted(path.stem for path in fresh.cache.rglob("0*.json"))
    assert not is_complete(fresh.cache)
    again = run_python("-m", "precompute", *flags(fresh))
    assert again.returncode == 0
    assert files(fresh.cache) == files(cache)
