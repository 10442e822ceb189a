"""--dry-run, the space that is needed, and the size of batches."""

import json
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from precompute.config import PrecomputeConfig
from precompute.encoding.batch_size import BatchSize, find_batch_size, in_parts
from precompute.planning.plan import RECORD_OVERHEAD_BYTES
from precompute.run import precompute
from tests.conftest import NUM_ROWS, TOKENS, Outcome, flags

TEXT_BYTES = 4 * (24 * 80 + TOKENS * 96 + 80)
LATENT_BYTES = 4 * 16 * 8 * 8


def test_a_dry_run_says_all_and_writes_nothing(
    fresh: PrecomputeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    precompute(replace(fresh, dry_run=True))
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert said.startswith("layout: ControlNet's prompt.json\n")
    prompts = NUM_ROWS + 1  # all distinct, and the empty one
    assert f"{NUM_ROWS} rows, {NUM_ROWS} captions, {prompts} distinct prompts" in said
    # Two prompts a shard, eight latents; what is in all, with headers.
    text_mb = prompts * (TEXT_BYTES + RECORD_OVERHEAD_BYTES) / 1e6
    latent_mb = NUM_ROWS * (LATENT_BYTES + RECORD_OVERHEAD_BYTES) / 1e6
    for name, records, shards, each, size_mb in (
        ("text", prompts, 6, TEXT_BYTES, text_mb),
        ("latents", NUM_ROWS, 2, LATENT_BYTES, latent_mb),
        ("conditioning/conditioning", NUM_ROWS, 2, LATENT_BYTES, latent_mb),
    ):
        cells = [name, records, shards, shards, each, f"{size_mb:.1f}", f"{size_mb:.1f}"]
        assert re.search(r"^ *" + r" +".join(map(str, cells)) + "$", said, re.MULTILINE), name
    pair_mb = 2 * (TEXT_BYTES + LATENT_BYTES + 3 * 64 * 64 + RECORD_OVERHEAD_BYTES) / 1e6
    needed = text_mb + 2 * latent_mb + pair_mb
    assert re.search(rf"^disk: {needed:.1f} MB needed, [\d.]+ MB free at ", said, re.MULTILINE)
    assert re.search(rf"  text: {prompts} prompts at [\d.e+]+/s, \d+ s; [\d.]+ GB of memory", said)
    assert re.search(rf"  latents: {2 * NUM_ROWS} images at [\d.e+]+/s, \d+ s; [\d.]+ GB", said)
    assert said.endswith("nothing was written to the cache\n")


def test_a_dry_run_of_a_finished_cache_has_nothing_to_make(
    cache: Path, precompute_config: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    precompute(replace(precompute_config, dry_run=True))
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before
    said = capsys.readouterr().out
    assert "disk: 0.0 MB needed" in said
    assert "prompts at" not in said


def test_a_dry_run_over_a_cache_that_lacks_a_row(
    cache: Path,
    fresh: PrecomputeConfig,
    circles: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "one more"
    shutil.copytree(circles, source)
    shutil.copy(source / "target" / "0.png", source / "target" / "new.png")
    with (source / "prompt.json").open("a") as file:
        row = {"source": "source/1.png", "target": "target/new.png", "prompt": "a new one"}
        file.write("\n" + json.dumps(row))
    shutil.copytree(cache, fresh.cache)
    before = {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*")}
    free_mb = shutil.disk_usage(fresh.cache).free / 1e6
    precompute(replace(fresh, source=str(source), dry_run=True))
    assert {path: path.stat().st_mtime_ns for path in fresh.cache.rglob("*")} == before
    said = capsys.readouterr().out
    assert f"{NUM_ROWS + 1} rows, {NUM_ROWS + 1} captions, {NUM_ROWS + 2} distinct" in said
    # The last of six shards of two prompts has room for one; of eight images two shards hold ten,
    # and three of eleven go into the second, with as many conditioning images.
    for name, shards, to_make in (("text", 6, 1), ("latents", 2, 1)):
        assert re.search(rf"^ *{name} +\d+ +{shards} +{to_make} ", said, re.MULTILINE), said
    # Each new shard is written beside the old one, which then goes.
    text, image = TEXT_BYTES + RECORD_OVERHEAD_BYTES, LATENT_BYTES + RECORD_OVERHEAD_BYTES
    old_text, old_latents = (
        (fresh.cache / name).stat().st_size for name in ("text/000005.tar", "latents/000001.tar")
    )
    after_text = 2 * text - old_text
    after_latents = after_text + 3 * image - old_latents
    needed = max(2 * text, after_text + 3 * image, after_latents + 3 * image)
    found = re.search(r"^disk: ([\d.]+) MB needed, ([\d.]+) MB free at ", said, re.MULTILINE)
    assert found is not None
    assert found[1] == f"{needed / 1e6:.1f}"
    assert float(found[2]) == pytest.approx(free_mb, rel=0.05)


def test_what_does_not_fit_the_disk_is_not_begun(
    fresh: PrecomputeConfig,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(100_000))
    outcome = command("precompute", *flags(fresh))
    assert outcome.exit_code == 2
    assert re.search(
        r"^Error: .*cannot write: .*about 0\.\d MB needed, 0\.1 MB free",
        outcome.output,
        re.MULTILINE,
    )
    assert not list(fresh.cache.rglob("*.tar"))
    dry = command("precompute", *flags(fresh), "--dry-run")
    assert "that does not fit" in dry.output


def test_what_failed_is_gone_before_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def compute(part: Tensor) -> dict[str, Tensor]:
        activations = part.clone()
        made.append(weakref.ref(activations))
        if len(made) == 2:  # the second part of the first attempt
            raise torch.OutOfMemoryError("full")
        return {"same": activations}

    def count() -> None:
        alive.append(sum(one() is not None for one in made))

    monkeypatch.setattr(torch.cuda, "empty_cache", count)
    batch = torch.arange(8.0).reshape(8, 1)
    found = in_parts(compute, [batch], BatchSize(4), item="", remedies=[])
    assert torch.equal(found["same"], batch)
    assert alive == [0]


def test_the_size_of_batches_is_as_told_or_the_usual_one_on_a_cpu() -> None:
    def never(_: int) -> object:
        raise AssertionError("nothing to find out")

    cpu = torch.device("cpu")
    assert find_batch_size(5, 8, cpu, never).now == 5
    assert find_batch_size("auto", 8, cpu, never).now == 8


def test_auto_is_an_option(fresh: PrecomputeConfig, command: Callable[..., Outcome]) -> None:
    assert command("precompute", *flags(fresh), "--vae-batch-size", "auto").exit_code == 0
    outcome = command("precompute", *flags(fresh), "--vae-batch-size", "many")
    assert outcome.exit_code == 2
    assert "'many' is neither a whole number nor auto" in outcome.output
    assert (
        "must be at least 1" in command("precompute", *flags(fresh), "--vae-batch-size", 0).output
    )
