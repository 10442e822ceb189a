"""Several caches in one run: each has its share, its own losses, and goes on where it stopped."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.synthetic import write_cache
from common.errors import ConfigError, ShardError
from sd3.pretrained import DATA_KEY
from shards.format import manifest
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles
from shards.reading.order import Order
from tests.conftest import BUCKETED, Outcome, flags, with_another_control
from train.config import TrainConfig
from train.data import TrainingSamples
from train.inputs import find_inputs
from train.run import train
from train.sets.find import find_sets
from train.sets.overlap import describe_overlap
from train.sets.training_set import TrainingSet, in_range, parse_location, set_names

WEIGHTS = "diffusion_pytorch_model.safetensors"


def hold_out(cache: Path, shard: int) -> Path:
    found = manifest.load(cache)
    manifest.write(cache, replace(found, held_out=[shard], samples=None))
    return cache


@pytest.fixture(scope="module")
def outlines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples of 8 x 8, four of them held out."""
    folder = tmp_path_factory.mktemp("outlines") / "outlines"
    write_cache(folder, BUCKETED, num_shards=3, images_per_shard=4, seed=1)
    return hold_out(folder, 0)


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples of 8 x 8, three of them held out."""
    folder = tmp_path_factory.mktemp("discs") / "discs"
    write_cache(folder, BUCKETED, num_shards=3, images_per_shard=3, seed=2)
    return hold_out(folder, 1)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six samples of 4 x 12."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    write_cache(folder, BUCKETED, num_shards=2, images_per_shard=3, seed=3, buckets=[(4, 12)])
    return folder


@pytest.fixture
def mixed(train_config: TrainConfig, outlines: Path, discs: Path) -> TrainConfig:
    """Three of the one to one of the other."""
    return replace(train_config, cache=(str(outlines), str(discs)), weights=(3.0, 1.0))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def equal(one: Path, other: Path) -> bool:
    first, second = weights_of(one), weights_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def samples_of(config: TrainConfig, step_samples: int = 2) -> TrainingSamples:
    sets, order = find_sets(config, step_samples)
    caches = [one.cache for one in sets]
    return TrainingSamples(caches, order, seed=config.seed, proportion_empty_prompts=0.3)


def test_each_place_reads_its_set(mixed: TrainConfig) -> None:
    samples = samples_of(mixed)
    batch = samples.fill(samples.allocate(8), range(8))
    come = Counter[int]()
    for place in range(8):
        number, shard, index = samples.order.record(place)
        come[number] += 1
        _, expected, prompts = samples.caches[number].sample(shard, index)
        assert torch.equal(batch.latent[place], expected["latent"])
        assert torch.equal(batch.conditioning_latent[place], expected["conditioning_latent"])
        texts = [samples.caches[number].embeddings(key) for key in prompts]
        texts.append(samples.caches[number].empty_prompt())
        assert any(torch.equal(batch.t5_embeds[place], text["t5_embeds"]) for text in texts)
        assert samples.key(place) == samples.caches[number].conditioning.index(shard).key(index)
    assert come == {0: 6, 1: 2}


def test_a_set_of_weight_0_changes_no_bit(
    mixed: TrainConfig, outlines: Path, tmp_path: Path
) -> None:
    train(replace(mixed, cache=(str(outlines), "not looked at"), weights=(1.0, 0.0)))
    train(replace(mixed, cache=(str(outlines),), weights=(), output_dir=tmp_path / "alone"))
    assert equal(mixed.output_dir, tmp_path / "alone")
    train(replace(mixed, weights=(1.0, 1.0), output_dir=tmp_path / "both"))
    assert not equal(mixed.output_dir, tmp_path / "both")


def test_a_stopped_run_goes_on_to_the_same_bits(mixed: TrainConfig, tmp_path: Path) -> None:
    parted = replace(mixed, output_dir=tmp_path / "parted", lr_scheduler="constant")
    whole = replace(parted, output_dir=tmp_path / "whole")
    train(replace(parted, max_train_steps=2))
    train(replace(parted, resume_from_checkpoint="latest"))
    train(whole)
    assert equal(parted.output_dir, whole.output_dir)
    for change, told in (
        ({"weights": (2.0, 1.0)}, "the caches have other weight of set 1\n"),
        ({"cache": (f"{mixed.cache[0]}[:3]", mixed.cache[1])}, "other range of set 1\n"),
        ({"cache": mixed.cache[:1], "weights": ()}, "sets that are mixed was 2, and is 1\n"),
        ({"cache": mixed.cache[::-1], "weights": (1.0, 3.0)}, "of set 1, weight of set 2\n"),
    ):
        with pytest.raises(ConfigError, match="made with other data") as raised:
            train(replace(parted, resume_from_checkpoint="latest", **change))
        assert told in str(raised.value)


def test_sizes_may_differ_and_each_step_is_of_one(
    train_config: TrainConfig, outlines: Path, wide: Path
) -> None:
    config = replace(train_config, cache=(str(outlines), str(wide)), repeats=(1, 2))
    samples = samples_of(config)
    shapes = [samples.bucket(place) for place in range(40)]
    assert shapes[::2] == shapes[1::2]
    assert Counter(shapes) == {(8, 8): 16, (4, 12): 24}  # 8 x 1 and 6 x 2 records
    train(config)


def test_each_set_has_its_own_held_out_loss(mixed: TrainConfig) -> None:
    train(replace(mixed, validation_steps=4, ema_decay=0.9))
    folder = mixed.output_dir / "validation"
    before = json.loads((folder / "step-000000" / "held_out.json").read_text())
    after = json.loads((folder / "step-000004" / "held_out.json").read_text())
    names = ["held_out_loss", "held_out_loss/outlines", "held_out_loss/discs"]
    assert list(before) == names
    assert list(after) == [*names, *(f"ema_{name}" for name in names)]
    whole, outlines, discs = (after[name] for name in names)
    means = [(3 * one + other) / 4 for one, other in zip(outlines, discs, strict=True)]
    assert whole == pytest.approx(means)
    assert outlines != discs


def test_what_was_mixed_stands_in_the_configuration_and_the_card(mixed: TrainConfig) -> None:
    train(mixed)
    data = json.loads((mixed.output_dir / "config.json").read_text())[DATA_KEY]
    assert [(one["name"], one["share"], one["num_records"]) for one in data["mixed"]] == [
        ("outlines", 0.75, 8),
        ("discs", 0.25, 6),
    ]
    assert data["buckets"] == [[64, 64]]
    card = (mixed.output_dir / "README.md").read_text()
    assert "trained on 14 pairs of an image and its control, at 64 x 64 pixels," in card
    assert 'with the control "conditioning".' in card
    assert 'set outlines: 8 samples, control "conditioning", 75.0% of the samples' in card
    assert str(mixed.cache[0]) not in card


def test_two_controls_of_a_cache_are_two_sets(
    train_config: TrainConfig, outlines: Path, tmp_path: Path
) -> None:
    cache = with_another_control(outlines, tmp_path / "two", "blurred")
    config = replace(
        train_config,
        cache=(str(cache), str(cache)),
        conditioning_name=("conditioning", "blurred"),
    )
    samples = samples_of(config)
    assert [one.conditioning_name for one in samples.caches] == ["conditioning", "blurred"]
    assert [one.name for one in find_sets(config, 2)[0]] == ["conditioning", "blurred"]
    # By default each sample comes equally often, and both have eight.
    assert Counter(samples.order.locate(place)[0] for place in range(16)) == {0: 8, 1: 8}
    train(config)
    card = (config.output_dir / "README.md").read_text()
    assert 'with the controls "conditioning" and "blurred", mixed.' in card


def test_a_range_has_these_records_alone(train_config: TrainConfig, outlines: Path) -> None:
    """Of shards of 4 records, of which the first is held out."""
    found = {}
    for text in ("[:3]", "[3:6]", "[-1:]", "[6:]", ""):
        samples = samples_of(replace(train_config, cache=(f"{outlines}{text}",)))
        count = samples.order.num_records
        found[text] = sorted(samples.order.record(place)[1:] for place in range(count))
    everything = [(shard, index) for shard in (1, 2) for index in range(4)]
    assert found == {
        "[:3]": everything[:3],
        "[3:6]": everything[3:6],
        "[-1:]": everything[-1:],
        "[6:]": everything[6:],
        "": everything,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0,)}, r"--weights 1: 1 for 2 caches; give one for each --cache\."),
        ({"weights": (0.0, 0.0)}, r"--weights 0 0: must be at least 0, and one above"),
        ({"weights": (-1.0, 2.0)}, r"--weights -1 2: must be at least 0"),
        ({"weights": (1.0, 2.0), "repeats": (1, 1)}, r"--weights and --repeats: give one of them"),
        ({"weights": (), "repeats": (0, 1)}, r"--repeats 0 1: must be at least 1; --weights 0"),
        ({"conditioning_name": ("a", "b", "c")}, r"--conditioning-name a b c: 3 for 2 caches"),
        ({"cache": ("one",)}, r"--weights 3 1: 2 for 1 caches"),
        ({"cache": ("one",), "weights": (3.0,)}, r"--weights 3: is about several caches"),
        ({"cache": (), "weights": ()}, r"--cache: give at least one"),
    ],
)
def test_settings_that_make_no_mix_are_refused(
    mixed: TrainConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(mixed, **changes)


def test_ranges_without_records_are_refused(mixed: TrainConfig, outlines: Path) -> None:
    for text in ("[8:]", "[3:3]", "[5:2]"):
        with pytest.raises(ConfigError, match=r"no records in this range; the cache has 8 to"):
            find_inputs(replace(mixed, cache=(f"{outlines}{text}", mixed.cache[1])), 1)
    with pytest.raises(ShardError, match="no such folder"):
        find_inputs(replace(mixed, cache=(mixed.cache[0], "no[:7]")), 1)


def test_sets_that_the_networks_would_see_differently_are_refused(
    mixed: TrainConfig, outlines: Path, tmp_path: Path
) -> None:
    write_cache(tmp_path / "long", replace(BUCKETED, tokens=24), 1, 2)
    with pytest.raises(ConfigError) as raised:
        find_inputs(replace(mixed, cache=(str(outlines), str(tmp_path / "long"))), 1)
    assert "cannot be mixed:\n  prompts, max_sequence_length: 20, 24\nRun" in str(raised.value)


def test_the_command_says_what_it_mixes(
    mixed: TrainConfig, command: Callable[..., Outcome], outlines: Path
) -> None:
    said = command("train", *flags(replace(mixed, max_train_steps=1))).output
    assert f"train: set outlines: 8 samples of {outlines}, control 'conditioning', 75.0%" in said
    assert "train: an epoch is 24 samples" in said  # six of one in four
    unused = replace(mixed, cache=(*mixed.cache, "elsewhere"), weights=(3.0, 1.0, 0.0))
    unused = replace(unused, max_train_steps=1, output_dir=mixed.output_dir / "unused")
    assert (
        "train: elsewhere: left out, since its weight is 0"
        in command("train", *flags(unused)).output
    )
    spelt = ["--shards", *mixed.cache, "--weights", 3, 1]
    plain = replace(
        mixed, cache=("",), weights=(), max_train_steps=1, output_dir=mixed.output_dir / "again"
    )
    rest = [part for part in flags(plain) if part not in ("--cache", "")]
    again = command("train", *spelt, *rest)
    assert again.exit_code == 0, again.output


def test_names_tell_sets_apart() -> None:
    assert set_names(["a"], ["c"]) == [""]
    assert set_names(["a", "a"], ["outlines", "discs"]) == ["outlines", "discs"]
    assert set_names(["runs/a", "s3://b/c/"], ["x", "x"]) == ["a", "c"]
    assert set_names(["a/cache", "b/cache"], ["x", "x"]) == ["a", "b"]
    assert set_names(["a", "a", "b"], ["x", "y", "x"]) == ["a-x", "a-y", "b-x"]
    assert set_names(["a", "a"], ["x", "x"]) == ["1-a-x", "2-a-x"]


def test_a_range_stands_in_the_configuration_and_on_the_card(
    mixed: TrainConfig, tmp_path: Path
) -> None:
    train(replace(mixed, cache=(f"{mixed.cache[0]}[2:5]", mixed.cache[1])))
    data = json.loads((mixed.output_dir / "config.json").read_text())[DATA_KEY]
    assert [one.get("records") for one in data["mixed"]] == [[2, 5], None]
    card = (mixed.output_dir / "README.md").read_text()
    assert "- set outlines: 3 samples (2 to 4 of its cache), control" in card
    alone = replace(mixed, cache=(f"{mixed.cache[0]}[-2:]",), weights=())
    train(replace(alone, output_dir=tmp_path / "alone"))
    assert "- samples (6 to 7 of its cache)\n" in (tmp_path / "alone" / "README.md").read_text()


def test_a_held_out_image_that_another_set_trains_on_is_said(held_out: Path, cache: Path) -> None:
    """Of ten rows; the one cache holds three of them out, the other none."""

    def whole(name: str, folder: Path) -> TrainingSet:
        found = Cache(folder)
        order = Order(found.manifest.training_records("conditioning"), seed=0)
        return TrainingSet(name, str(folder), (0, order.num_records), found, order, 1)

    few, many = whole("few", held_out), whole("many", cache)
    (line,) = describe_overlap([few, many])
    assert line.startswith("set many trains on 3 of the 3 images that few holds out, so")
    assert describe_overlap([few, few]) == describe_overlap([many, many]) == []


def test_locations_and_ranges() -> None:
    for wrong in ("a[:x]", "a[5]", "a[1:2:3]", "a[]"):
        with pytest.raises(ConfigError, match=r"no range; a range is cache\[:1000\]"):
            parse_location(wrong)
    assert parse_location("a/b[:1000]") == ("a/b", slice(None, 1000))
    assert parse_location("s3://a[5:-2]") == ("s3://a", slice(5, -2))
    assert parse_location("a[b]/c") == ("a[b]/c", slice(None))
    assert in_range([4, 0, 3], 2, 6) == ([2, 0, 2], [2, 0, 0])


class Released(LocalFiles):
    """A cache that notes up to which place its shards were released."""

    released = 0

    def release_before(self, place: int) -> None:
        self.released = place


def test_shards_are_released_by_each_sets_own_places(mixed: TrainConfig) -> None:
    samples = samples_of(mixed)
    files = [Released(Path(location)) for location in mixed.cache]
    samples.caches = [Cache(one) for one in files]
    samples.release_before(12)
    assert [one.released for one in files] == [9, 3]


def test_each_set_has_its_own_curve_of_the_loss(
    mixed: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(
        "accelerate.Accelerator.log", lambda _, values, **__: logged.append(dict(values))
    )
    train(replace(mixed, logging_steps=4))
    (values,) = logged
    of_sets = 0.75 * values["loss/outlines"] + 0.25 * values["loss/discs"]  # 6 and 2 samples
    assert values["loss"] == pytest.approx(of_sets)
