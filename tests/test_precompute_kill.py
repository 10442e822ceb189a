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
from pathlib import Path

import pytest

from precompute.config import PrecomputeConfig
from shards import manifest
from shards.errors import ShardError
from tests.conftest import REPOSITORY, flags, run_python

NUM_KILLS = 200


def run_alone(config: PrecomputeConfig) -> None:
    import torch

    from precompute.run import precompute

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


@pytest.mark.slow
def test_killed_at_any_moment_it_is_finished_to_the_same_bytes(fresh: PrecomputeConfig) -> None:
    # Forked from a process that has imported everything and run nothing: a second a run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["precompute.run", "demo.base", "demo.vae"])
    cache = fresh.output_dir

    def start() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_alone, args=(fresh,))
        process.start()
        return process

    def finish() -> float:
        """Run to the end; return how long writing took, in seconds."""
        process = start()
        begun = written_from(process)
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - begun

    def written_from(process: multiprocessing.process.BaseProcess) -> float:
        """Wait for the first byte; return when that was."""
        while not cache.exists() and process.is_alive():
            time.sleep(0.001)
        return time.monotonic()

    finish()
    expected = files(cache)
    shutil.rmtree(cache)
    duration_s = finish()
    assert files(cache) == expected

    rng = random.Random(0)
    unfinished = 0
    for kill in range(NUM_KILLS):
        shutil.rmtree(cache)
        process = start()
        written_from(process)
        time.sleep(rng.uniform(0, duration_s))
        process.kill()
        process.join()
        # What counts as finished is whole; what does not is no cache.
        left = files(cache)
        complete = is_complete(cache)
        unfinished += not complete
        if complete:
            assert left == expected, f"kill {kill}: passes for complete"
        for name, data in left.items():
            if name.endswith(".json"):
                tar = name.replace(".json", ".tar")
                assert data == expected[name], f"kill {kill}: {name}"
                assert name == "manifest.json" or left[tar] == expected[tar], f"kill {kill}: {tar}"
        finish()
        assert files(cache) == expected, f"kill {kill}: other bytes"
    assert unfinished > NUM_KILLS / 2


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
    text = fresh.output_dir / "text"
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
    assert not list(fresh.output_dir.rglob("*.tmp-*"))
    tars = sorted(path.stem for path in fresh.output_dir.rglob("*.tar"))
    assert tars == sorted(path.stem for path in fresh.output_dir.rglob("0*.json"))
    assert not is_complete(fresh.output_dir)
    again = run_python("-m", "precompute", *flags(fresh))
    assert again.returncode == 0
    assert files(fresh.output_dir) == files(cache)
