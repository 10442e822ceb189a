"""Shards are written while the next ones are encoded, and errors of writing end the run."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common import atomic_files
from common.interruption import InterruptedRun
from common.progress import Progress
from precompute.config import PrecomputeConfig
from precompute.encoding import image_pass, pipeline
from precompute.encoding.encoder_clock import EncoderClock
from precompute.encoding.image_pass import encode_images
from precompute.encoding.shard_writer import ShardWriter
from precompute.encoding.text_pass import encode_text
from precompute.encoding.vae_encoder import VaeEncoder
from precompute.planning.prepare import prepare
from precompute.run import precompute
from tests.conftest import NUM_ROWS

WAIT_S = 60.0  # for what must happen; never reached when all is well
LATENTS_PER_SHARD = 5
NUM_CALLS = NUM_ROWS + 1  # the first batch is encoded twice


@pytest.fixture
def config(fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> PrecomputeConfig:
    """One image a batch, one batch ahead, and two shards of latents."""
    monkeypatch.setattr(pipeline, "BATCHES_AHEAD", 1)
    return replace(
        fresh,
        vae_batch_size=1,
        dataloader_num_workers=1,
        shard_mb=LATENTS_PER_SHARD * 4100 / 1e6,  # of 4,096 bytes each
        validation_prompt=(),
        validation_image=(),
    )


def patch_commit(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Call `act` before a file of the cache is synced and renamed to its name."""
    original = atomic_files.move_into_place

    def move_into_place(temporary: Path, path: Path) -> None:
        if path.as_posix().endswith(name):
            act()
        original(temporary, path)

    monkeypatch.setattr(atomic_files, "move_into_place", move_into_place)


def patch_encode(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], object]) -> None:
    """Call `act` with the number of each call of the VAE, from 1."""
    original = VaeEncoder.encode
    calls = 0

    def encode(self: VaeEncoder, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls)
        return original(self, *arguments)

    monkeypatch.setattr(VaeEncoder, "encode", encode)


def tars(config: PrecomputeConfig, product: str) -> list[str]:
    return sorted(path.name for path in (config.cache / product).glob("*.tar"))


def test_a_slow_disk_does_not_hold_up_the_encoder(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_encoded, in_time = threading.Event(), []
    patch_encode(monkeypatch, lambda call: all_encoded.set() if call == NUM_CALLS else None)
    # The sync of the first shard ends only when all of the second is encoded.
    patch_commit(
        monkeypatch, "latents/000000.tar", lambda: in_time.append(all_encoded.wait(WAIT_S))
    )
    precompute(config)
    assert in_time == [True]
    assert tars(config, "latents") == ["000000.tar", "000001.tar"]


def test_a_full_disk_stops_the_run_with_the_same_error(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch_encode(monkeypatch, calls.append)
    patch_commit(monkeypatch, "latents/000000.tar", fail)
    with pytest.raises(
        OSError, match=r"cannot write: No space left on device \(about 0\.0 MB needed, .* MB free\)"
    ) as caught:
        precompute(config)
    assert caught.value.filename == str(config.cache / "latents" / "000000.tar")
    assert len(calls) <= NUM_CALLS  # no conditioning image was encoded
    assert not tars(config, "latents")
    assert not list(config.cache.rglob("*.tmp-*"))
    assert len(tars(config, "text")) > 1
    monkeypatch.undo()
    precompute(config)
    assert len(tars(config, "latents")) == 2


class FailingBuild:
    """A shard that cannot be written."""

    def write(self, _: Any) -> None:
        raise OSError(errno.EIO, "broken")


def submit(builds: list[Any]) -> None:
    with ShardWriter() as writer:
        for build in builds:
            writer.submit(build, [])


def raise_error(writer: ShardWriter) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        writer.raise_error()
        threading.Event().wait(0.01)


def test_an_error_is_raised_when_it_is_known_and_at_the_end() -> None:
    with pytest.raises(OSError, match="broken"):
        submit([FailingBuild()])
    never = WaitingBuild()
    with pytest.raises(OSError, match="broken"):
        submit([FailingBuild(), never])
    assert not never.begun.is_set()
    failing: Any = FailingBuild()
    with ShardWriter() as writer:
        writer.submit(failing, [])
        with pytest.raises(OSError, match="broken"):
            raise_error(writer)


class WaitingBuild:
    """A shard that is being written until it is released."""

    def __init__(self) -> None:
        self.begun, self.released, self.done = (threading.Event() for _ in range(3))

    def write(self, _: Any) -> None:
        self.begun.set()
        assert self.released.wait(WAIT_S)
        self.done.set()


def test_one_shard_is_written_at_a_time_and_finished_whatever_happens() -> None:
    first, second = WaitingBuild(), WaitingBuild()

    def interrupted(builds: list[Any]) -> None:
        with ShardWriter() as writer:
            writer.submit(builds[0], [])
            writer.raise_error()  # there is none, and it does not wait
            assert first.begun.wait(WAIT_S)
            threading.Timer(0.05, first.released.set).start()
            writer.submit(builds[1], [])
            assert first.done.is_set()  # before the second is taken
            second.released.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted([first, second])
    assert second.done.is_set()


def test_a_signal_leaves_whole_shards_and_the_bar_moves_with_each_batch(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    class Bar(Progress):
        def update(self, count: int = 1) -> None:
            counts.append(count)
            super().update(count)

    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:
            raise InterruptedRun(signal.SIGTERM)

    context = prepare(config)
    clock = EncoderClock(context.device)
    embeds = encode_text(context, lambda: None, clock)
    monkeypatch.setattr(image_pass, "Progress", Bar)
    with pytest.raises(InterruptedRun):
        encode_images(context, embeds, check, clock)
    # Both shards had been handed to the writer before the check that ended the run.
    assert counts == [1] * 2 * LATENTS_PER_SHARD
    assert tars(config, "latents") == ["000000.tar", "000001.tar"]
    assert not (config.cache / "conditioning").exists()
