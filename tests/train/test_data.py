"""Batches: drawn by place alone, shared out among ranks without overlap, padded as SD3 is."""

import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import TINY, write_cache
from sd3.prompt_embeds import prompt_embeds
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles, Window
from shards.reading.mixed_order import unmixed
from shards.reading.order import Order
from shards.reading.reader import ProductReader
from train.data import RankPlaces, TrainingSamples, read_batches


def samples(cache: Path, seed: int = 0, empty: float = 0.0) -> TrainingSamples:
    found = Cache(cache)
    order = Order(found.conditioning.product.shard_records, seed=seed)
    return TrainingSamples([found], unmixed(order), seed=seed, proportion_empty_prompts=empty)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@given(
    ranks=st.integers(1, 16),
    batch=st.integers(1, 5),
    steps=st.integers(1, 6),
    start=st.integers(0, 100),
)
def test_ranks_share_out_the_sequence(ranks: int, batch: int, steps: int, start: int) -> None:
    taken = [
        list(islice(RankPlaces(start, batch_size=batch, rank=rank, num_ranks=ranks), steps))
        for rank in range(ranks)
    ]
    in_order = [
        place for step in range(steps) for rank in range(ranks) for place in taken[rank][step]
    ]
    assert in_order == list(range(start, start + ranks * batch * steps))


def test_a_place_draws_the_same_whenever_it_is_asked(cache: Path) -> None:
    first = samples(cache)
    assert equal(first[13], samples(cache)[13])
    assert not torch.equal(first[3]["noise"], first[13]["noise"])
    assert not torch.equal(samples(cache, seed=1)[13]["noise"], first[13]["noise"])


def test_a_sample_comes_with_its_own_caption(cache: Path) -> None:
    ours, found = samples(cache), Cache(cache)
    for place in range(10):
        _, tensors, prompts = found.sample(*ours.order.record(place)[1:])
        assert torch.equal(ours[place]["latent"], tensors["latent"])
        assert torch.equal(ours[place]["t5_embeds"], found.embeddings(prompts[0])["t5_embeds"])


def test_draws_have_the_right_distribution(cache: Path) -> None:
    ours = samples(cache)
    drawn = [ours[place] for place in range(200)]
    noise = torch.stack([one["noise"] for one in drawn])
    count = noise.numel()
    assert abs(noise.mean().item()) < 5 / count**0.5
    assert abs(noise.var().item() - 1) < 5 * (2 / count) ** 0.5
    uniform = torch.stack([one["uniform"] for one in drawn])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / 200) ** 0.5)


def test_prompts_are_dropped_anew_each_epoch(cache: Path) -> None:
    empty = Cache(cache).empty_prompt()["pooled_embeds"]
    ours = samples(cache, empty=0.3)
    dropped = [torch.equal(ours[place]["pooled_embeds"], empty) for place in range(500)]
    assert sum(dropped) == pytest.approx(150, abs=5 * (500 * 0.3 * 0.7) ** 0.5)
    records = [{ours.order.record(p) for p in range(e, e + 10) if dropped[p]} for e in (0, 10, 20)]
    assert records[0] != records[1]
    assert not any(torch.equal(samples(cache)[p]["pooled_embeds"], empty) for p in range(30))


def test_all_captions_are_drawn_alike(cache: Path) -> None:
    ours = samples(cache)
    arrays = {name: tensor.numpy() for name, tensor in ours.allocate(1).draws.items()}
    drawn = [ours.draw(arrays, 0, place, num_prompts=3) for place in range(300)]
    assert set(drawn) == {0, 1, 2}
    for caption in range(3):
        assert drawn.count(caption) == pytest.approx(100, abs=5 * (300 / 3 * 2 / 3) ** 0.5)


def test_the_posterior_is_sampled_anew(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = samples(held_out)
    read, deviations = ours.caches[0].read, {"latent": 0.5, "conditioning_latent": 0.25}

    def read_wide(batch: dict[str, torch.Tensor], *others: Any) -> None:
        """Read, and put deviations that can be seen in place of the miniature VAE's."""
        read(batch, *others)
        for name, deviation in deviations.items():
            batch[f"{name}_std"].fill_(deviation)

    monkeypatch.setattr(ours.caches[0], "read", read_wide)
    _, means, _ = ours.caches[0].sample(*ours.order.record(0)[1:])
    # The same record in four epochs.
    places = [p for p in range(40) if ours.order.record(p) == ours.order.record(0)]
    assert len(places) == 4
    drawn = [ours[place] for place in places]
    for name, deviation in deviations.items():
        normal = torch.stack([(one[name] - means[name]) / deviation for one in drawn])
        count = normal.numel()
        assert abs(normal.mean().item()) < 5 / count**0.5
        assert abs(normal.var().item() - 1) < 5 * (2 / count) ** 0.5
        assert not torch.equal(normal[0], normal[1])
        # Not the noise, which is to be removed.
        noise = torch.stack([one["noise"] for one in drawn])
        assert abs((normal * noise).mean().item()) < 5 / count**0.5


def test_a_key_is_that_of_the_tars_member(many: Path) -> None:
    ours = samples(many)
    members = []
    for shard in range(7):
        with tarfile.open(many / f"conditioning/conditioning/{shard:06d}.tar") as tar:
            names = dict.fromkeys(name.partition(".")[0] for name in tar.getnames())
        members.append([name for name in names if name])
    for place in range(35):
        _, shard, slot = ours.order.record(place)
        assert ours.key(place) == members[shard][slot]


class Watched(LocalFiles):
    """A cache on this machine that notes what a remote one would fetch and remove."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.first_window_ends: list[int] = []
        self.released: list[int] = []

    def read_ahead(self, windows: Iterator[Window], *_: Any) -> AbstractContextManager[None]:
        self.first_window_ends.append(next(windows)[0])
        return nullcontext()

    def release_before(self, place: int) -> None:
        self.released.append(place)


def test_shards_are_fetched_from_the_start_on_and_released_batch_by_batch(many: Path) -> None:
    files = Watched(many)
    found = Cache(files)
    order = Order(found.conditioning.product.shard_records, seed=0, window=1)
    ours = TrainingSamples([found], unmixed(order), seed=0, proportion_empty_prompts=0.0)
    places = RankPlaces(12, batch_size=2, rank=1, num_ranks=2)
    reading = read_batches(ours, places, num_workers=0, pin=False)
    assert [taken for taken, _ in islice(reading, 3)] == [[14, 15], [18, 19], [22, 23]]
    reading.close()
    assert files.first_window_ends == [15]  # the third shard of five
    assert files.released == [14, 18, 22]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 35 tiny samples in 7 shards."""
    folder = tmp_path_factory.mktemp("many") / "cache"
    write_cache(folder, TINY, num_shards=7, images_per_shard=5)
    return folder


@given(
    phases=st.lists(
        st.tuples(st.integers(1, 16), st.integers(0, 4), st.integers(1, 2), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    ),
    start=st.integers(0, 100),
    window=st.none() | st.integers(1, 8),
)
@settings(max_examples=30, deadline=None)
def test_resumed_on_other_ranks_and_workers_the_sequence_goes_on(
    many: Path, phases: list[tuple[int, int, int, int]], start: int, window: int | None
) -> None:
    found = Cache(many)
    order = Order(found.conditioning.product.shard_records, seed=3, window=window)
    ours = TrainingSamples([found], unmixed(order), seed=3, proportion_empty_prompts=0.2)
    place, taken = start, list[int]()
    for ranks, workers, batch_size, steps in phases:
        for rank in range(ranks):
            places = RankPlaces(place, batch_size=batch_size, rank=rank, num_ranks=ranks)
            reading = read_batches(ours, places, num_workers=workers, pin=False)
            for step, (read, batch) in enumerate(islice(reading, steps)):
                taken += read
                first = place + (step * ranks + rank) * batch_size
                for row in range(batch_size):
                    expected = ours[first + row]
                    for name, value in expected.items():
                        assert torch.equal(vars(batch)[name][row], value), (name, first + row)
            reading.close()
        place += ranks * batch_size * steps
    # No place twice, and none left out; so each record comes once an epoch.
    assert sorted(taken) == list(range(start, place))
    assert len({(one // 35, order.record(one)) for one in taken}) == len(taken)


@pytest.mark.slow
@given(
    phases=st.lists(
        st.tuples(
            st.sampled_from([(1, 16), (2, 8), (4, 4), (4, 2), (8, 2), (16, 1), (8, 1), (2, 2)]),
            st.integers(0, 3),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=3,
    ),
    start=st.integers(0, 6),
    window=st.none() | st.integers(1, 8),
)
@settings(max_examples=20, deadline=None)
def test_batches_are_of_one_bucket_however_a_step_is_shared_out(
    bucketed: Path,
    phases: list[tuple[tuple[int, int], int, int]],
    start: int,
    window: int | None,
) -> None:
    found = Cache(bucketed)
    product = found.conditioning.product
    group = 16  # ranks x batch size x accumulated batches
    order = Order(
        product.shard_records,
        seed=3,
        window=window,
        shard_buckets=product.shard_buckets,
        group=group,
    )
    ours = TrainingSamples([found], unmixed(order), seed=3, proportion_empty_prompts=0.2)
    place = start * group
    for (ranks, batch_size), workers, steps in phases:
        accumulation = group // (ranks * batch_size)
        shapes = []
        for rank in range(ranks):
            places = RankPlaces(place, batch_size=batch_size, rank=rank, num_ranks=ranks)
            reading = read_batches(ours, places, num_workers=workers, pin=False)
            mine = []
            for number, (_, batch) in enumerate(islice(reading, steps * accumulation)):
                first = place + (number * ranks + rank) * batch_size
                mine.append(batch.latent.shape[1:])
                assert batch.noise.shape == batch.latent.shape == batch.conditioning_latent.shape
                for row in range(batch_size):
                    _, tensors, _ = found.sample(*order.record(first + row))
                    assert torch.equal(batch.latent[row], tensors["latent"])
                    expected = tensors["conditioning_latent"]
                    assert torch.equal(batch.conditioning_latent[row], expected)
                    assert torch.equal(batch.noise[row], ours[first + row]["noise"])
                    assert torch.equal(batch.t5_embeds[row], ours[first + row]["t5_embeds"])
            reading.close()
            shapes.append(mine)
        for step in range(steps):
            batches = slice(step * accumulation, (step + 1) * accumulation)
            (shape,) = {one for mine in shapes for one in mine[batches]}
            assert shape == (16, *ours.bucket(place + step * group))
        place += group * steps


def test_places_of_two_buckets_are_no_batch(bucketed: Path) -> None:
    ours = samples(bucketed)  # in an order that knows of no buckets
    buckets = [ours.bucket(place) for place in range(35)]
    other = next(place for place in range(35) if buckets[place] != buckets[0])
    with pytest.raises(AssertionError):
        ours.fill(ours.allocate(2, buckets[0]), [0, other])


def test_a_prompt_that_comes_again_is_read_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = samples(cache, empty=1.0)
    read: list[tuple[int, int]] = []
    original = type(ours.caches[0].text).read_into

    def read_into(self: ProductReader, shard: int, index: int, *more: object) -> None:
        if self is ours.caches[0].text:
            read.append((shard, index))
        original(self, shard, index, *more)

    monkeypatch.setattr(ProductReader, "read_into", read_into)
    batch = ours.fill(ours.allocate(4), range(4))
    assert read == [(0, 0)]
    empty = Cache(cache).empty_prompt()
    for name, expected in empty.items():
        assert all(torch.equal(row, expected) for row in getattr(batch, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(cache: Path, workers: int) -> None:
    places = RankPlaces(4, batch_size=3, rank=1, num_ranks=2)
    reading = read_batches(samples(cache), places, num_workers=workers, pin=False)
    batches = [batch for _, batch in islice(reading, 3)]
    ours = samples(cache)
    for number, batch in enumerate(batches):
        first = 4 + 3 + 6 * number
        for row in range(3):
            assert torch.equal(batch.noise[row], ours[first + row]["noise"])
            assert torch.equal(batch.latent[row], ours[first + row]["latent"])


def test_clip_is_padded_to_the_width_of_t5() -> None:
    clip, t5 = torch.ones(2, 3, 4), torch.full((2, 5, 7), 2.0)
    joined = prompt_embeds(clip, t5)
    assert joined.shape == (2, 8, 7)
    assert joined[:, :3, :4].eq(1).all()
    assert joined[:, :3, 4:].eq(0).all()
    assert joined[:, 3:].eq(2).all()
