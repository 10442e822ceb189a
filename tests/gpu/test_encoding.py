"""Stage 1 on the device: what reaches the host is whole, and what the CPU gives."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.device import AsyncHostCopy
from precompute.config import PrecomputeConfig
from precompute.encoding.encoder_clock import EncoderClock
from precompute.run import precompute
from shards.reading.cache import Cache

pytestmark = pytest.mark.gpu
FOLDERS = ("text", "latents", "conditioning/conditioning", "validation/conditioning")


def made_on(device: object, fresh: PrecomputeConfig, folder: Path) -> Path:
    """Encode both passes on a device, without TF32; return the cache."""
    config = replace(fresh, cache=folder, device=str(device), allow_tf32=False)
    precompute(config)
    return folder


def assert_same_bytes(one: Path, other: Path) -> None:
    for folder in FOLDERS:
        shards = sorted((one / folder).glob("*.tar"))
        assert shards
        for shard in shards:
            assert shard.read_bytes() == (other / folder / shard.name).read_bytes()


def all_devices(device: torch.device) -> list[torch.device]:
    """Return every GPU that is here; the thread's current one is the first."""
    if device.type != "cuda":
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def test_copies_to_the_host_are_whole(device: torch.device) -> None:
    for one in all_devices(device):
        check_copies(one)


def check_copies(device: torch.device) -> None:
    """Check copies that are all under way at once, while the device goes on computing."""
    torch.manual_seed(0)
    matrix = torch.randn(512, 512, device=device)
    copies, expected = [], []
    for _ in range(32):
        matrix = matrix @ matrix / matrix.norm()
        half = matrix[::2].to(torch.bfloat16)
        copies.append(AsyncHostCopy({"whole": matrix, "half": half}))
        expected.append(matrix.clone())
        del half  # its memory may be used again at once
        matrix = matrix + 0.01
    for copy, whole in zip(copies, expected, strict=True):
        found = copy.wait()
        assert found["whole"].equal(whole.cpu())
        assert found["half"].equal(whole[::2].to(torch.bfloat16).cpu())


def test_the_encoders_time_is_the_devices(device: torch.device) -> None:
    clock = EncoderClock(device)
    matrix = torch.randn(1024, 1024, device=device)
    start = time.perf_counter()
    for _ in range(20):
        with clock.measure(1):
            matrix = matrix @ matrix / matrix.norm()
    seconds = clock.seconds
    passed = time.perf_counter() - start
    assert 0 < seconds <= passed
    time.sleep(0.2)
    assert clock.seconds == seconds  # waiting is no computing


def test_records_are_those_of_the_cpu(
    cache: Path, fresh: PrecomputeConfig, device: torch.device, tmp_path: Path
) -> None:
    expected, found = Cache(cache), Cache(made_on(device, fresh, tmp_path / "device"))
    count = 0
    for shard, index in expected.conditioning.locations():
        key, tensors, prompts = expected.sample(shard, index)
        same_key, same_tensors, same_prompts = found.sample(shard, index)
        assert (same_key.split("-")[0], len(same_prompts)) == (key.split("-")[0], len(prompts))
        pairs = [(tensors, same_tensors)]
        for one, other in zip(prompts, same_prompts, strict=True):
            pairs.append((expected.embeddings(one), found.embeddings(other)))
        for one, other in pairs:
            for name, tensor in one.items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-3)
                count += 1
    assert count > 10


def test_a_device_gives_the_same_bytes_twice(
    fresh: PrecomputeConfig, device: torch.device, tmp_path: Path
) -> None:
    assert_same_bytes(
        made_on(device, fresh, tmp_path / "one"), made_on(device, fresh, tmp_path / "two")
    )


@pytest.mark.usefixtures("two_cards")
def test_the_second_card_gives_the_same_bytes(fresh: PrecomputeConfig, tmp_path: Path) -> None:
    if torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two GPUs of one kind")
    assert_same_bytes(
        made_on("cuda:0", fresh, tmp_path / "one"), made_on("cuda:1", fresh, tmp_path / "two")
    )
