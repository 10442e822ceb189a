"""Stage 1: nothing is computed twice, and what cannot be used is told."""

import errno
import gc
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from diffusers import AutoencoderKL
from PIL import Image
from transformers import (
    CLIPTextModelWithProjection,
    T5EncoderModel,
)

from common.errors import ConfigError, ShardError
from precompute.config import PrecomputeConfig
from precompute.planning.bad_rows import BadRows
from precompute.run import precompute
from precompute.sources.files.listed import Listed
from precompute.sources.source import Kind
from shards import verify
from shards.format import manifest, sidecar
from shards.format.sidecar import Skipped
from shards.reading.cache import Cache
from tests.conftest import TOKENS, Outcome
from tests.precompute.edited_source import copy_of, rows


def times(cache: Path, product: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / product).rglob("*.tar")}


def indexed_prompts(cache: Path) -> list[str]:
    """Return the caption of each sample as the index of samples says it."""
    table = pq.read_table(cache / "samples.parquet")
    return [row["prompts"][0]["prompt"] for row in table.to_pylist()]


def test_a_finished_cache_is_left_alone(cache: Path, precompute_config: PrecomputeConfig) -> None:
    def files() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for path in cache.rglob("*")
            if path.is_file() and not path.name.startswith("hashes.")
        }

    before = files()
    precompute(precompute_config)
    assert before == files()


def test_the_same_inputs_elsewhere_give_the_same_bytes(
    cache: Path, fresh: PrecomputeConfig, circles: Path, base: Path, tmp_path: Path
) -> None:
    source, model = tmp_path / "other source", tmp_path / "other model"
    shutil.copytree(circles, source)
    shutil.copytree(base, model)
    precompute(replace(fresh, source=source, pretrained_model_name_or_path=str(model)))
    ours = {path.relative_to(cache): path.read_bytes() for path in cache.rglob("0*.*")}
    theirs = {
        path.relative_to(fresh.cache): path.read_bytes() for path in fresh.cache.rglob("0*.*")
    }
    assert len(ours) > 10
    assert ours == theirs


def test_a_new_resolution_keeps_the_text_and_no_other_control(
    cache: Path, fresh: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache, fresh.cache)
    text = times(fresh.cache, "text")
    precompute(replace(fresh, resolution=48, conditioning_name="depth"))
    assert times(fresh.cache, "text") == text
    assert Cache(fresh.cache, "depth").sample(0, 0)[1]["latent"].shape == (16, 6, 6)
    # The old control's latents are of 64 px.
    found = manifest.load(fresh.cache)
    assert [*found.conditioning, *found.conditioning_specs, *found.validation] == ["depth"] * 3
    said = capsys.readouterr().out
    assert "conditioning 'conditioning' was made for other latents: make it again" in said
    told = "other controls go with the latents, which change, and are to be made again: "
    assert f"  {told}'conditioning'\n" in said


def test_a_new_caption_keeps_the_latents(
    cache: Path, fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    shutil.copytree(cache, fresh.cache)
    latents = times(fresh.cache, "latents") | times(fresh.cache, "conditioning")

    def edit(lines: list[dict[str, object]]) -> None:
        lines[0]["prompt"] = "something else"

    precompute(replace(fresh, source=copy_of(circles, tmp_path / "edited", edit)))
    kept = times(fresh.cache, "latents") | times(fresh.cache, "conditioning")
    assert kept == latents
    found = Cache(fresh.cache)
    prompts = [
        found.text.metadata(*found.text.locate(found.sample(shard, index)[2][0]))["prompt"]
        for shard, count in enumerate(found.conditioning.product.shard_records)
        for index in range(count)
    ]
    assert prompts == ["something else", *(row["prompt"] for row in rows(circles)[1:])]
    assert indexed_prompts(fresh.cache) == prompts


def test_swapped_captions_are_noticed(
    cache: Path, fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    # The set of prompts and its order of appearance stay the same; only who bears them changes.
    first, second = (row["prompt"] for row in rows(circles)[:2])

    def edit(lines: list[dict[str, object]]) -> None:
        lines[2]["prompt"] = first

    source = copy_of(circles, tmp_path / "one", edit)
    precompute(replace(fresh, source=source))
    before = manifest.load(fresh.cache)

    def swap(lines: list[dict[str, object]]) -> None:
        lines[2]["prompt"] = second

    precompute(replace(fresh, source=copy_of(circles, tmp_path / "two", swap)))
    after = manifest.load(fresh.cache)
    assert after.text == before.text
    assert after.latents.shard_sha256 == before.latents.shard_sha256
    assert after.latents.fingerprint == before.latents.fingerprint
    assert after.captions != before.captions
    assert indexed_prompts(fresh.cache)[2] == second
    found = Cache(fresh.cache)
    assert found.text.metadata(*found.text.locate(found.sample(0, 2)[2][0]))["prompt"] == second


def test_bad_rows_are_left_out_and_named(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(lines: list[dict[str, object]]) -> None:
        lines[1]["prompt"] = None
        lines[3]["target"] = "target/none.png"
        lines[9]["prompt"] = "\ud83d"

    source = copy_of(circles, tmp_path / "bad", edit)
    (source / "target" / "5.png").write_bytes(b"")
    (source / "source" / "7.png").write_bytes(b"<html>")
    config = replace(fresh, source=source, max_bad_fraction=0.5)
    precompute(config)
    found = manifest.load(fresh.cache)
    assert found.num_skipped == 5
    assert found.latents.num_records == 6  # row 7 has an image, though no conditioning image
    assert found.conditioning["conditioning"].num_records == 5
    first = sidecar.load(fresh.cache / "latents", 0)
    assert first is not None
    missing = "target/none.png: No such file or directory"
    assert Skipped("line 4, target/none.png", missing) in first.skipped
    output = capsys.readouterr().out
    assert "5 rows were left out" in output
    for line in (2, 4, 6, 8, 10):
        assert f"  line {line}, target/" in output
    assert all(not faults for _, faults in verify.faults(fresh.cache))
    with pytest.raises(ShardError, match=r"5 of 10 rows cannot be used, more than --max-bad-fract"):
        precompute(replace(config, max_bad_fraction=0.4))


def test_strict_stops_at_any_bad_row(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    source = copy_of(circles, tmp_path / "bad", lambda _: None)
    (source / "target" / "5.png").write_bytes(b"")
    config = replace(fresh, source=source, max_bad_fraction=0.5)
    with pytest.raises(ShardError, match=r"1 of 10 rows .* 0 \(--strict\) allows"):
        precompute(replace(config, strict=True))
    precompute(config)


def test_the_bound_on_bad_rows_is_met_exactly() -> None:
    # As the user types it, of a hundred rows; 0.29 * 100 is 28.999999999999996.
    for number in range(100):
        skipped = {row: Skipped(f"line {row}", "") for row in range(number + 1)}
        bad = BadRows(100, float(f"{number / 100:.2f}"))
        bad.add({row: skipped[row] for row in range(number)})
        said = f"{number + 1} of 100 rows cannot" if number < 99 else "none of the 100 rows can"
        with pytest.raises(ShardError, match=f"{said} be used"):
            bad.add(skipped)


def test_another_background_makes_other_latents(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(circles, tmp_path / "transparent"))
    with Image.open(source / "target" / "2.png") as image:
        image.putalpha(100)
        image.save(source / "target" / "2.png")
    fresh = replace(fresh, source=str(source))
    precompute(fresh)
    before = manifest.load(fresh.cache)
    precompute(replace(fresh, background="#FFF"))  # the same colour by another name
    assert manifest.load(fresh.cache) == before
    precompute(replace(fresh, background="black"))
    after = manifest.load(fresh.cache)
    assert after.latents.fingerprint != before.latents.fingerprint
    assert after.text == before.text
    with pytest.raises(ConfigError, match="--background purplish: no colour"):
        replace(fresh, background="purplish")


def test_a_file_that_changes_or_goes_while_working_stops_the_run(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.sources.kept_images.KEPT_BYTES", 0)
    original = Listed.read
    for second, message in (
        (lambda data: data + b" ", r"target/3\.png was changed while precompute was running"),
        (None, r"target/3\.png could be read when the run was planned and cannot now"),
    ):
        seen: list[tuple[int, str]] = []

        def read(
            self: Listed,
            index: int,
            kind: Kind,
            second: Callable[[bytes], bytes] | None = second,
            seen: list[tuple[int, str]] = seen,
        ) -> bytes:
            data = original(self, index, kind)
            if (index, kind) != (3, "image") or (index, kind) not in seen:
                seen.append((index, kind))
                return data
            if second is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return second(data)

        monkeypatch.setattr(Listed, "read", read)
        with pytest.raises(ShardError, match=message):
            precompute(fresh)
    monkeypatch.setattr(Listed, "read", original)
    precompute(fresh)
    assert manifest.load(fresh.cache).num_skipped == 0


def test_validation_pairs_of_another_control_go_stale_with_the_text(
    cache: Path, fresh: PrecomputeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cache, fresh.cache)
    precompute(replace(fresh, conditioning_name="depth", max_sequence_length=TOKENS + 2))
    assert "validation pairs of 'conditioning' had other text encoders" in capsys.readouterr().out
    found = manifest.load(fresh.cache)
    assert found.conditioning.keys() == {"conditioning", "depth"}
    assert found.validation["conditioning"].num_records == 0
    assert found.validation["depth"].num_records == 2
    none = {"validation_prompt": (), "validation_image": ()}
    precompute(replace(fresh, conditioning_name="depth", max_sequence_length=TOKENS + 2, **none))
    gone = "validation pairs of 'depth' are gone, since no --validation-prompt is given"
    assert gone in capsys.readouterr().out
    assert all(not faults for _, faults in verify.faults(fresh.cache))


def test_other_controls_survive_an_interruption(
    cache: Path, fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import precompute.run

    shutil.copytree(cache, fresh.cache)
    precompute.run.precompute(replace(fresh, conditioning_name="depth"))
    encode_images = precompute.run.encode_images

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    longer = replace(fresh, conditioning_name="depth", max_sequence_length=TOKENS + 2)
    monkeypatch.setattr(precompute.run, "encode_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        precompute.run.precompute(longer)
    with pytest.raises(ShardError, match="incomplete"):
        manifest.load(fresh.cache)
    monkeypatch.setattr(precompute.run, "encode_images", encode_images)
    precompute.run.precompute(longer)
    assert manifest.load(fresh.cache).conditioning.keys() == {"conditioning", "depth"}
    assert sorted(p.name for p in fresh.cache.glob("manifest*")) == ["manifest.json"]


def test_files_of_others_are_left_alone(fresh: PrecomputeConfig) -> None:
    (fresh.cache / "text").mkdir(parents=True)
    mine = [fresh.cache / "text" / name for name in ("captions.json", "000099.jsonl")]
    names = ("text/000001.tar", "hashes.npy", "plan.safetensors", "manifest.json")
    stale = [fresh.cache / f"{name}.tmp-12" for name in names]
    busy = [fresh.cache / f"{name}.tmp-13" for name in names]
    for path in (*mine, *stale, *busy):
        path.write_text("x")
    for path in stale:
        os.utime(path, (0, 0))
    precompute(fresh)
    assert all(path.exists() for path in (*mine, *busy))
    assert not any(path.exists() for path in stale)
    strange = fresh.cache.parent / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"strange: not a cache, it holds thesis\.tex"):
        precompute(replace(fresh, cache=strange))


def test_encoders_are_gone_after_their_pass(
    fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import precompute.run

    def alive(*kinds: type) -> int:
        gc.collect()
        return sum(isinstance(thing, kinds) for thing in gc.get_objects())

    before = alive(CLIPTextModelWithProjection, T5EncoderModel, AutoencoderKL)
    encode_images = precompute.run.encode_images

    def watching(*arguments: object) -> None:
        assert alive(CLIPTextModelWithProjection, T5EncoderModel, AutoencoderKL) == before
        encode_images(*arguments)

    monkeypatch.setattr(precompute.run, "encode_images", watching)
    precompute.run.precompute(fresh)
    assert alive(CLIPTextModelWithProjection, T5EncoderModel, AutoencoderKL) == before


def test_an_interrupted_run_goes_on_where_it_stopped(
    cache: Path, fresh: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from precompute.encoding.vae_encoder import VaeEncoder

    original = VaeEncoder.encode
    calls = 0

    def failing(self: VaeEncoder, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(VaeEncoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute(fresh)
    with pytest.raises(ShardError, match=r"incomplete.*latents: 2 finished.*Run the same"):
        manifest.load(fresh.cache)
    kept = times(fresh.cache, "latents")
    precompute(fresh)
    assert kept.items() <= times(fresh.cache, "latents").items()
    for path in cache.rglob("0*.*"):
        assert (fresh.cache / path.relative_to(cache)).read_bytes() == path.read_bytes()
    assert not list(fresh.cache.rglob("*.tmp-*"))


def test_a_shrunken_source_leaves_no_surplus_shards(
    fresh: PrecomputeConfig, circles: Path, tmp_path: Path
) -> None:
    precompute(fresh)

    def edit(lines: list[dict[str, object]]) -> None:
        del lines[4:]

    precompute(replace(fresh, source=copy_of(circles, tmp_path / "short", edit)))
    assert sorted(path.name for path in (fresh.cache / "latents").iterdir()) == [
        "000000.json",
        "000000.tar",
    ]
    assert manifest.load(fresh.cache).latents.num_records == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 100}, "--resolution 100: must be divisible by 16"),
        ({"resolution": 0}, "--resolution 0: must be divisible by 16"),
        ({"shard_mb": 0}, "--shard-mb 0: must be above 0"),
        ({"vae_batch_size": 0}, "--vae-batch-size 0: must be at least 1"),
        ({"max_sequence_length": 513}, "--max-sequence-length 513: must be 1 to 512"),
        ({"max_bad_fraction": 2.0}, "--max-bad-fraction"),
        ({"conditioning_name": "../x"}, "--conditioning-name"),
        ({"validation_image": ()}, "2 --validation-prompt and 0 --validation-image"),
    ],
)
def test_wrong_settings_are_refused(
    fresh: PrecomputeConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(fresh, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "nowhere"], "--source nowhere: no such file or folder"),
        (["--resolution", "100"], "--resolution 100: must be divisible by 16"),
        (["--pretrained-model-name-or-path", "./nowhere"], "no such folder, and not a hub id"),
        (["--pretrained-model-name-or-path", "no/where"], "the hub could not be reached"),
        (["--device", "cuda:99"], "--device cuda:99: not available here"),
        (["--cache", "Makefile"], "--cache Makefile: is a file; give a folder"),
        (
            ["--validation-prompt", "p", "--validation-image", "none.png"],
            "--validation-image none.png: No such file",
        ),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    fresh: PrecomputeConfig,
    command: Callable[..., Outcome],
    arguments: list[str],
    message: str,
) -> None:
    from tests.conftest import flags

    plain = replace(fresh, validation_prompt=(), validation_image=())
    outcome = command("precompute", *flags(plain)[:-2], *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert outcome.output.rstrip().splitlines()[-1].startswith("Error: ")
    assert not fresh.cache.exists()


def test_a_base_without_a_vae_is_refused_before_anything_is_written(
    fresh: PrecomputeConfig, base: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model, ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ConfigError, match=r"no vae/ in it; found scheduler/, text_encoder/"):
        precompute(replace(fresh, pretrained_model_name_or_path=str(model)))
    assert not fresh.cache.exists()


def test_a_part_of_the_rows_is_chosen_by_seed_and_grows(
    fresh: PrecomputeConfig, circles: Path
) -> None:
    def images(limit: int, seed: int = 0) -> list[str]:
        precompute(replace(fresh, max_train_samples=limit, seed=seed))
        found = Cache(fresh.cache).latents
        return [
            found.metadata(shard, index)["image_hash"]
            for shard, count in enumerate(found.product.shard_records)
            for index in range(count)
        ]

    everything = images(10)
    some = images(4)
    assert len(some) == 4
    assert [one for one in everything if one in some] == some
    assert set(some) < set(images(6))
    assert set(some) != set(images(4, seed=1))
    with pytest.raises(ConfigError, match="--max-train-samples 0: must be at least 1"):
        replace(fresh, max_train_samples=0)


@pytest.mark.parametrize(("given", "cores", "expected"), [(None, 2, 2), (None, 64, 16), (5, 2, 5)])
def test_images_are_loaded_by_as_many_threads_as_there_are_cores(
    given: int | None,
    cores: int,
    expected: int,
    fresh: PrecomputeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("precompute.config.num_cores", lambda: cores)
    assert replace(fresh, dataloader_num_workers=given).num_loaders == expected
