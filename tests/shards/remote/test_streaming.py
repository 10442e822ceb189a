"""Remote caches: real servers on loopback, well-behaved and not."""

import contextlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import synthetic
from common.errors import ConfigError, ShardError
from shards.reading.cache import Cache
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from shards.remote import streaming
from shards.remote.folder import RemoteFolder
from shards.remote.local_copies import LocalCopies
from shards.remote.streaming import RemoteFiles, open_files
from tests.conftest import flags, free_port, run_python, running
from tests.shards.remote.conftest import Server
from train.config import TrainConfig
from train.data import RankPlaces, TrainingSamples, read_batches
from train.run import train

pytestmark = pytest.mark.usefixtures("patience")


def open_remote(url: str, folder: Path, limit_bytes: int = 1 << 30) -> Cache:
    return Cache(RemoteFiles(RemoteFolder(url), folder, limit_bytes))


def everything(cache: Cache) -> list[torch.Tensor]:
    found = list(cache.empty_prompt().values())
    for shard, count in enumerate(cache.conditioning.product.shard_records):
        for index in range(count):
            _, tensors, prompts = cache.sample(shard, index)
            found += [*tensors.values(), *cache.embeddings(prompts[0]).values()]
    return found


def same(read: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(read) == len(right) and all(map(torch.equal, read, right))


def sent(handler: Any, data: bytes, length: int | None = None) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)
    return True


def drops(handler: Any, path: str, before: int, data: bytes) -> bool:
    """Close the connection in the middle of each file, twice."""
    if before >= 2:
        return False
    sent(handler, data[: len(data) // 2], len(data))
    handler.close_connection = True
    return True


def truncates(handler: Any, path: str, before: int, data: bytes) -> bool:
    return before < 1 and sent(handler, data[: len(data) // 2])


def stalls(handler: Any, path: str, before: int, data: bytes) -> bool:
    if before >= 1 or not path.startswith("latents/"):  # each costs the time that is waited for it
        return False
    sent(handler, data[:100], len(data))
    handler.wfile.flush()
    time.sleep(1.5)
    handler.close_connection = True
    return True


def trickles(handler: Any, path: str, before: int, data: bytes) -> bool:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for start in range(0, len(data), 1 + len(data) // 4):
        handler.wfile.write(data[start : start + 1 + len(data) // 4])
        time.sleep(0.02)
    return True


def alters_once(handler: Any, path: str, before: int, data: bytes) -> bool:
    return before < 1 and path != "manifest.json" and sent(handler, data[:-1] + b"\xff")


def overloaded(handler: Any, path: str, before: int, data: bytes) -> bool:
    if before >= 2:
        return False
    handler.send_error(503)
    return True


@pytest.mark.parametrize(
    "fault", [drops, truncates, stalls, trickles, alters_once, overloaded], ids=lambda f: f.__name__
)
def test_what_a_server_does_for_a_while_is_survived(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server], fault: Callable[..., bool]
) -> None:
    server = serve(cache)
    if fault is truncates:  # of a manifest's length nobody knows, so it is refused as damaged
        server.misbehave = lambda handler, path, before, data: (
            path != "manifest.json" and truncates(handler, path, before, data)
        )
    else:
        server.misbehave = fault
    assert same(everything(open_remote(server.url, tmp_path / "local")), everything(Cache(cache)))
    left = [path for path in (tmp_path / "local").rglob("*.part") if path.is_file()]
    assert left == []


def always(act: Callable[[Any, bytes], bool]) -> Callable[..., bool]:
    def fault(handler: Any, path: str, before: int, data: bytes) -> bool:
        return path == "latents/000000.tar" and act(handler, data)

    return fault


def refuses(handler: Any, data: bytes) -> bool:
    handler.send_error(403)
    return True


def floods(handler: Any, data: bytes) -> bool:
    return sent(handler, data + bytes(1 << 20))


@pytest.mark.parametrize(
    ("act", "reason", "times"),
    [
        (lambda h, d: sent(h, d[:1000]), r"cut short, \d+ bytes expected, 1000 came", 6),
        (lambda h, d: sent(h, bytes(len(d))), "not the bytes that the manifest lists", 2),
        (refuses, "the server answers 403 Forbidden", 1),
        (floods, "sends more than the \\d+ bytes expected", 1),
        (lambda h, d: sent(h, d[:1000], len(d)), r"ClientPayloadError|ended|Connection", 6),
    ],
    ids=["truncates", "alters", "forbids", "floods", "drops"],
)
def test_what_a_server_does_for_ever_is_refused_with_url_and_reason(
    cache: Path,
    tmp_path: Path,
    serve: Callable[[Path], Server],
    act: Callable[[Any, bytes], bool],
    reason: str,
    times: int,
) -> None:
    server = serve(cache)
    found = open_remote(server.url, tmp_path / "local")
    server.misbehave = always(act)
    with pytest.raises(ShardError, match=rf"^{server.url}/latents/000000\.tar: .*({reason})"):
        found.sample(0, 0)
    assert server.asked.count("latents/000000.tar") == times
    assert not list((tmp_path / "local").rglob("000000.tar.*.part"))


def test_a_missing_file_is_named(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(tmp_path)
    with pytest.raises(ShardError, match=r"/manifest\.json: no such file there"):
        open_remote(server.url, tmp_path / "local")
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ShardError, match=rf"^{nobody}/manifest\.json: .*\(tried 6 times\)"):
        open_remote(nobody, tmp_path / "local")


@pytest.mark.parametrize(
    "address",
    [
        "pipe:cat /etc/passwd",
        "simplecache::http://127.0.0.1/x",
        "file:///etc",
        "ssh://host/x",
        "github://a:b@c",
        "zip://x::http://y",
        "http://",
        "https://host/cache?token=1",
    ],
)
def test_other_addresses_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="address"):
        open_files(address, tmp_path, 1.0)


def test_a_half_fetched_file_is_never_used(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(cache)
    code = (
        "import sys; from pathlib import Path\n"
        "from shards.reading.cache import Cache; from shards.remote.folder import RemoteFolder\n"
        "from shards.remote.streaming import RemoteFiles\n"
        "found = Cache(RemoteFiles(RemoteFolder(sys.argv[1]), Path(sys.argv[2]), 1 << 30))\n"
        "found.sample(0, 0)"
    )

    def hangs(handler: Any, path: str, before: int, data: bytes) -> bool:
        if path != "latents/000000.tar":
            return False
        sent(handler, data[: len(data) // 2], len(data))
        handler.wfile.flush()
        time.sleep(30)
        return True

    server.misbehave = hangs
    with running(["-c", code, server.url, tmp_path / "local"]) as process:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in (tmp_path / "local").rglob("000000.tar.*.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    server.misbehave = lambda *_: False
    assert same(everything(open_remote(server.url, tmp_path / "local")), everything(Cache(cache)))


def tar_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.tar"):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile, as is meant
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("buckets", [[(4, 4)], [(2, 6), (6, 2)]])
def test_a_bounded_folder_holds_what_is_read_and_what_comes_next(
    tmp_path: Path, serve: Callable[[Path], Server], buckets: list[tuple[int, int]]
) -> None:
    cache, local = tmp_path / "cache", tmp_path / "local"
    synthetic.write_cache(
        cache, synthetic.TINY, num_shards=10, images_per_shard=12, buckets=buckets
    )
    server, here = serve(cache), Cache(cache)
    products = (here.text.product, here.latents.product, here.conditioning.product)
    # Room for five of ten shards of images with their prompts: two windows, and one to spare.
    limit = sum(product.num_bytes for product in products) // 2
    found = open_remote(server.url, local, limit)
    order = Order(
        found.conditioning.product.shard_records,
        seed=0,
        window=2,
        shard_buckets=found.conditioning.product.shard_buckets,
        group=2,
    )

    def batches(opened: Cache, count: int) -> list[torch.Tensor]:
        ours = TrainingSamples([opened], unmixed(order), seed=0, proportion_empty_prompts=0.0)
        places = RankPlaces(0, batch_size=2, rank=0, num_ranks=1)
        reading = read_batches(ours, places, num_workers=2, pin=False)
        read = []
        for _, batch in islice(reading, count):
            read += [batch.latent, batch.conditioning_latent, batch.t5_embeds]
            sizes.append(tar_bytes(local))
        reading.close()
        return read

    sizes: list[int] = []
    assert same(batches(found, 150), batches(here, 150))  # two epochs and a half
    assert max(sizes) <= limit
    fetched = [path for path in server.asked if path.endswith(".tar")]
    assert 60 <= len(fetched) <= 31 * 3  # more than two epochs; nothing came twice in one


def test_nothing_else_in_the_local_folder_is_touched(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    local = tmp_path / "local"
    for name in ("imagenet/train.tar", "imagenet/000000.tar", "imagenet/000000.json"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(bytes(1000))
    largest = max(path.stat().st_size for path in cache.rglob("*.tar"))
    everything(open_remote(serve(cache).url, local, 2 * largest))
    assert sorted(path.name for path in (local / "imagenet").iterdir()) == [
        "000000.json",
        "000000.tar",
        "train.tar",
    ]
    assert tar_bytes(local / "sd3-controlnet-shards") <= 2 * largest


def test_reading_ahead_outlives_a_server_that_is_away_for_a_while(
    tmp_path: Path, serve: Callable[[Path], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "POLL_S", 0.05)
    cache = tmp_path / "cache"
    synthetic.write_cache(cache, synthetic.TINY, num_shards=6, images_per_shard=4)
    server = serve(cache)
    found = open_remote(server.url, tmp_path / "local")
    server.misbehave = lambda handler, path, *_: path.endswith(".json") and refuses(handler, b"")
    order = Order(found.conditioning.product.shard_records, seed=0, window=1)
    with found.read_ahead(order, 0):
        time.sleep(0.3)
        server.misbehave = lambda *_: False
        deadline = time.monotonic() + 30
        while len(list((tmp_path / "local").rglob("*.tar"))) < 3:
            assert time.monotonic() < deadline, "nothing is read ahead any more"
            time.sleep(0.05)


def test_transfers_end_when_nobody_waits_for_them(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.remote.retry.FIRST_WAIT_S", 60.0)
    server = serve(cache)
    server.misbehave = always(lambda h, d: sent(h, d[:1000], len(d)))
    folder = RemoteFolder(server.url)
    failed: list[Exception] = []

    def fetch() -> None:
        try:
            folder.fetch("latents/000000.tar", tmp_path / "tar", size=10**6, sha256=None)
        except ShardError as error:
            failed.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    while not server.asked:
        time.sleep(0.01)
    folder.give_up()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "latents/000000.tar" in str(failed[0])


def test_damage_in_the_local_folder_is_mended_or_named(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server, local = serve(cache), tmp_path / "local"
    everything(open_remote(server.url, local))
    for path in local.rglob("*.json"):
        path.write_bytes(b"{}")
    assert same(everything(open_remote(server.url, local)), everything(Cache(cache)))
    (path,) = local.rglob("latents/000000.tar")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardError, match=rf"delete {path}, and it is fetched again"):
        everything(open_remote(server.url, local))
    path.unlink()
    assert same(everything(open_remote(server.url, local)), everything(Cache(cache)))


def test_what_was_fetched_is_not_fetched_again(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(cache)
    everything(open_remote(server.url, tmp_path / "local"))
    first = len(server.asked)
    everything(open_remote(server.url, tmp_path / "local"))
    assert server.asked[first:] == ["manifest.json"]


def test_another_cache_at_the_same_address_is_read_as_it_is(
    cache: Path, bucketed: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    url = serve(tmp_path / "served").url
    for now in (cache, bucketed):
        shutil.copytree(now, tmp_path / "served")
        assert same(everything(open_remote(url, tmp_path / "local")), everything(Cache(now)))
        shutil.rmtree(tmp_path / "served")


def test_what_is_done_with_may_be_removed_by_other_processes(
    tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    cache, local = tmp_path / "cache", tmp_path / "local"
    synthetic.write_cache(cache, synthetic.TINY, num_shards=4, images_per_shard=4)
    found = open_remote(serve(cache).url, local)
    order = Order(found.conditioning.product.shard_records, seed=0, window=1)
    (end, (first,)), (_, (second,)) = islice(order.windows(0), 2)
    with found.read_ahead(order, 0):
        deadline = time.monotonic() + 60
        for shard in (first, second):
            while found.files._copies.opened(("latents", shard)) is None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        found.files.release_before(end)
        others = LocalCopies(found.files.remote, local / streaming.OWN_FOLDER, "other", 1)
        others.make_room(0, [])
        left = {path.name for path in local.rglob("latents/*.tar")}
    assert f"{first:06d}.tar" not in left
    assert f"{second:06d}.tar" in left


def test_a_window_without_room_is_refused_before_anything_is_fetched(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(cache)
    found = open_remote(server.url, tmp_path / "local", 30_000)
    order = Order(found.conditioning.product.shard_records, seed=0)
    # Not even single shards have room: the two that there are take as much one by one.
    with (
        pytest.raises(ShardError, match=r"2 shards mixed at a time .* is 3e-05; give room for"),
        found.read_ahead(order, 0),
    ):
        pass


def test_a_smaller_window_is_advised_where_it_has_room(
    tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    synthetic.write_cache(tmp_path / "cache", synthetic.TINY, num_shards=8, images_per_shard=4)
    here = Cache(tmp_path / "cache")
    products = (here.text.product, here.latents.product, here.conditioning.product)
    # All shards are alike but that of the empty prompt, which every window needs.
    empty, *_ = here.text.product.shard_bytes
    each = (sum(product.num_bytes for product in products) - empty) // 8
    url = serve(tmp_path / "cache").url
    for limit, advice in (
        (empty + 4 * each, r"give --shuffle-window 2, or room"),
        (empty + 4 * each - 1, r"give --shuffle-window 1, or room"),
        (empty + 2 * each - 1, r"give room"),
    ):
        found = open_remote(url, tmp_path / f"local-{limit}", limit)
        order = Order(found.conditioning.product.shard_records, seed=0, window=4)
        with pytest.raises(ShardError, match=advice), found.read_ahead(order, 0):
            pass


def test_two_windows_must_have_room(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    here = Cache(cache)
    products = (here.text.product, here.latents.product, here.conditioning.product)
    total = sum(product.num_bytes for product in products)
    url = serve(cache).url
    # Two windows of one shard are the whole cache; one of them is about half of it.
    order = Order(here.conditioning.product.shard_records, seed=0, window=1)
    with (
        pytest.raises(ShardError, match="1 shards mixed at a time and the next 1 take"),
        open_remote(url, tmp_path / "local", total - 1).read_ahead(order, 0),
    ):
        pass
    with open_remote(url, tmp_path / "local", total).read_ahead(order, 0):
        pass


@pytest.mark.slow
def test_processes_share_a_folder(
    cache: Path, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(cache)
    server.misbehave = trickles
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.shards.remote.test_streaming import everything, open_remote\n"
        "everything(open_remote(sys.argv[1], Path(sys.argv[2])))"
    )
    arguments = [sys.executable, "-c", code, server.url, str(tmp_path / "local")]
    processes = [subprocess.Popen(arguments) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    fetched = [path for path in server.asked if path != "manifest.json"]
    assert sorted(fetched) == sorted(set(fetched))


@pytest.mark.slow
def test_training_from_a_url_gives_the_weights_of_training_from_the_folder(
    train_config: TrainConfig, tmp_path: Path, serve: Callable[[Path], Server]
) -> None:
    train(train_config)
    server = serve(Path(train_config.cache[0]))
    away = replace(
        train_config,
        cache=(server.url,),
        output_dir=tmp_path / "away",
        local_cache_dir=tmp_path / "local",
        dataloader_num_workers=2,
    )
    done = run_python("-m", "train", *flags(away), NO_PROXY="127.0.0.1")
    assert done.returncode == 0, done.stderr
    name = "diffusion_pytorch_model.safetensors"
    assert (away.output_dir / name).read_bytes() == (train_config.output_dir / name).read_bytes()
