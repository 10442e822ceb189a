"""Many workers: each makes its part, and the cache is the one that a single worker makes."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.planning.workers import Part, find_part
from precompute.run import precompute
from shards.format import manifest
from tests.conftest import Outcome, flags, free_port, run_python

PRIVATE = ("run.json", "hashes.npy", "hashes.npy.lock")


def files(cache: Path) -> dict[str, bytes]:
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name not in PRIVATE
    }


@pytest.mark.parametrize("count", [2, 3, pytest.param(20, marks=pytest.mark.slow)])
def test_parts_in_any_order_give_the_bytes_of_one_worker(
    cache: Path, fresh: PrecomputeConfig, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    for index in reversed(range(count)):
        assert not (fresh.cache / "manifest.json").exists()
        precompute(replace(fresh, part=f"{index}/{count}"))
        said = capsys.readouterr().out
        assert (f"part {index}/{count} is done" in said) == (index > 0)
    assert files(fresh.cache) == files(cache)


def test_parts_without_a_common_disk_are_copied_together_and_sealed(
    cache: Path, fresh: PrecomputeConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    parts = [tmp_path / f"part{index}" for index in range(3)]
    for index, folder in enumerate(parts):
        precompute(replace(fresh, cache=folder, part=f"{index}/3"))
    together = tmp_path / "together"
    for folder in parts[:2]:
        shutil.copytree(folder, together, dirs_exist_ok=True)
    outcome = command("shards", "seal", together)
    assert outcome.exit_code == 2
    assert "not complete; text lacks " in outcome.output
    assert "(000002, 000005" in outcome.output
    shutil.copytree(parts[2], together, dirs_exist_ok=True)
    outcome = command("shards", "seal", together)
    said = f"{together}: complete, 10 pairs, 0 rows left out\n"
    assert (outcome.exit_code, outcome.output) == (0, said)
    assert files(together) == files(cache)
    assert command("shards", "seal", together).exit_code == 0
    assert files(together) == files(cache)


def test_what_is_no_cache_is_not_sealed(command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = command("shards", "seal", tmp_path)
    assert outcome.exit_code == 2
    assert "no plan.safetensors, so nothing was begun here" in outcome.output
    (tmp_path / "plan.safetensors").write_bytes(b"nonsense")
    assert "damaged" in command("shards", "seal", tmp_path).output


def test_a_later_run_with_another_number_of_workers_finishes_the_rest(
    cache: Path, fresh: PrecomputeConfig
) -> None:
    precompute(replace(fresh, part="1/3"))
    precompute(replace(fresh, part="0/2"))
    precompute(fresh)
    assert files(fresh.cache) == files(cache)


@pytest.mark.slow
def test_changes_are_made_in_parts_as_well(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    source = tmp_path / "source"
    shutil.copytree(circles, source)
    config = replace(fresh, source=str(source))
    for folder in (alone, shared):
        precompute(replace(config, cache=folder))
    lines = (source / "prompt.json").read_text().splitlines()
    lines[3:5] = [lines[5].replace("circle", "disc"), lines[0].replace("circle", "disc")]
    (source / "prompt.json").write_text("\n".join(lines))
    precompute(replace(config, cache=alone))
    for part in ("1/2", "0/2"):
        precompute(replace(config, cache=shared, part=part))
    assert files(shared) == files(alone)
    assert manifest.load(shared).latents.shard_records == [8, 2]


def launch(config: PrecomputeConfig, num_processes: int) -> str:
    """Precompute under `accelerate launch`; return what it prints.

    With one thread each: a CPU's number of threads decides in which order it adds up.
    """
    several = ("--multi_gpu",) if num_processes > 1 else ()
    done = run_python(
        *("-m", "accelerate.commands.launch", *several, "--num_machines", 1),
        *("--num_processes", num_processes, "--main_process_port", free_port()),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "precompute", *flags(config)),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def one_process(
    precompute_config: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the cache that one launched process makes."""
    folder = tmp_path_factory.mktemp("one") / "cache"
    launch(replace(precompute_config, cache=folder), 1)
    return files(folder)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_accelerate_launch_gives_the_bytes_of_one_process(
    one_process: dict[str, bytes], fresh: PrecomputeConfig, count: int
) -> None:
    said = launch(fresh, count)
    assert files(fresh.cache) == one_process
    # One speaks for all.
    assert said.count("latents: 10 records in 2 shards") == 1


@pytest.mark.slow
def test_two_workers_on_one_part_do_no_harm(cache: Path, fresh: PrecomputeConfig) -> None:
    arguments = [sys.executable, "-m", "precompute", *flags(fresh)]
    workers = [
        subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=200)
        assert worker.returncode == 0, errors
    assert files(fresh.cache) == files(cache)


def test_which_part_is_ours() -> None:
    assert find_part(None, {}) == Part(0, 1)
    assert find_part("2/4", {}) == Part(2, 4)
    assert find_part(None, {"RANK": "1", "WORLD_SIZE": "2"}) == Part(1, 2)
    # Every part of a launch has a shard of its own in each round.
    parts = {
        find_part(f"{index}/3", {"RANK": str(rank), "WORLD_SIZE": "2"}).index
        for index in range(3)
        for rank in range(2)
    }
    assert parts == set(range(6))
    for wrong in ("", "1", "4/4", "-1/4", "1/0", "a/b", "1/2/3"):
        with pytest.raises(ConfigError, match="expected i/n with i from 0 to n - 1"):
            find_part(wrong, {})
