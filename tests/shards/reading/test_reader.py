"""Reading a cache: any record at once, and a clear word where something is not as it should be."""

import gc
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ShardError
from shards import verify
from shards.format import manifest, sidecar
from shards.reading.cache import Cache
from shards.reading.tensors import empty_tensors
from tests.conftest import BUCKETS, Outcome, reseal, write_manifest


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "cache")
    return tmp_path / "cache"


def faults(cache: Path) -> list[str]:
    return [fault for _, found in verify.faults(cache) for fault in found]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_the_manifest_survives_writing_and_reading(cache: Path, tmp_path: Path) -> None:
    found = manifest.load(cache)
    manifest.write(tmp_path, found)
    assert manifest.load(tmp_path) == found


def test_the_empty_prompt_is_always_there(cache: Path) -> None:
    found = Cache(cache)
    assert found.text.metadata(0, 0) == {"prompt": ""}
    assert found.empty_prompt().keys() == {"clip_embeds", "t5_embeds", "pooled_embeds"}


def test_files_close_with_the_reader(cache: Path) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        Cache(cache).sample(0, 0)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_cache_without_the_wanted_control_names_those_it_has(cache: Path) -> None:
    with pytest.raises(
        ShardError, match=r"no conditioning 'depth'; found 'conditioning': choose one by --cond"
    ):
        Cache(cache, "depth")


def test_a_reference_to_a_record_that_changed_is_noticed(cache: Path) -> None:
    found = Cache(cache)
    prompt = found.sample(0, 0)[2][0]
    stale = prompt[:-4] + ("0000" if prompt[-4:] != "0000" else "1111")
    for key in (stale, "000099-00000-0000000000000000"):
        with pytest.raises(ShardError, match=r"no record .* run precompute again"):
            found.embeddings(key)


def test_nothing_where_a_cache_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder; make the cache first"):
        manifest.load(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="not a cache"):
        manifest.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="no such folder; make the cache first"):
        manifest.load(tmp_path / "file")


def test_a_whole_cache_has_no_faults(cache: Path) -> None:
    assert faults(cache) == []


@pytest.mark.parametrize("product", ["text", "latents", "conditioning/conditioning"])
def test_every_flipped_bit_is_found(copy: Path, product: str) -> None:
    path = copy / product / "000000.tar"
    size = path.stat().st_size
    for at in range(0, size, size // 7):
        flip(path, at)
        assert any("sha256 is not the one in the manifest" in fault for fault in faults(copy))
        flip(path, at)
    assert faults(copy) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: os.truncate(c / "text" / "000000.tar", 4096), "bytes expected, found 4096"),
        (lambda c: (c / "latents" / "000001.tar").unlink(), "000001.tar"),
        (lambda c: (c / "latents" / "000001.json").unlink(), "missing, though manifest.json"),
        (
            lambda c: (c / "text" / "000002.json").write_text("[]"),
            "000002.json: not the sidecar that manifest.json was written for",
        ),
        (
            lambda c: shutil.copy(c / "text" / "000000.json", c / "text" / "000001.json"),
            "000001.json: not the sidecar that manifest.json was written for",
        ),
    ],
)
def test_damage_is_listed(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    assert any(message in fault for fault in faults(copy))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            {"dtype": "float16"},
            "clip_embeds expected [24, 80] float16, found [24, 80] float32",
        ),
        ({"t5_width": 97}, "t5_embeds expected [20, 97] float32, found [20, 96]"),
    ],
)
def test_shapes_and_dtypes_are_held_against_the_manifest(
    copy: Path, edit: dict[str, object], message: str
) -> None:
    path = copy / "manifest.json"
    values = json.loads(path.read_text())
    values["text_spec"] |= edit
    path.write_text(json.dumps(values))
    with pytest.raises(ShardError, match=r"manifest\.json: changed since it was written"):
        faults(copy)
    reseal(copy)
    assert any(message in fault for fault in faults(copy))


def test_a_record_whose_bytes_changed_is_not_read(copy: Path) -> None:
    loaded = sidecar.load(copy / "latents", 1)
    assert loaded is not None
    start, size, metadata_start, _ = loaded.spans[0]
    for at, read, message in (
        (start + size - 1, "tensors", "its bytes are not as"),
        (metadata_start, "metadata", "its JSON is not as"),
    ):
        flip(copy / "latents" / "000001.tar", at)
        reader = Cache(copy).latents
        with pytest.raises(ShardError, match=rf"000001\.tar: record {loaded.keys[0]}: {message}"):
            getattr(reader, read)(1, 0)
        flip(copy / "latents" / "000001.tar", at)
    reader.tensors(1, 0)


def test_a_caption_that_points_nowhere_is_listed(copy: Path) -> None:
    path = copy / "latents" / "000000.json"
    values = json.loads(path.read_text())
    values["prompts"][0] = ["000000-00001-0000000000000000"]
    values["prompts"][1] = []
    path.write_text(json.dumps(values))
    assert "not the sidecar that manifest.json was written for" in faults(copy)[0]
    reseal(copy)
    found = faults(copy)
    assert len(found) == 3
    assert "no record '000000-00001-0000000000000000'" in found[0]
    assert "has no caption" in found[1]
    assert "captions are not those the manifest was written for" in found[2]


def test_exchanged_captions_are_found(copy: Path) -> None:
    path = copy / "latents" / "000000.json"
    values = json.loads(path.read_text())
    prompts = values["prompts"]
    prompts[0], prompts[1] = prompts[1], prompts[0]
    path.write_text(json.dumps(values))
    reseal(copy)
    (fault,) = faults(copy)
    assert "captions are not those the manifest was written for" in fault


def test_opening_a_cache_checks_that_all_shards_are_there(copy: Path) -> None:
    Cache(copy)
    os.truncate(copy / "text" / "000002.tar", 512)
    with pytest.raises(ShardError, match=r"000002\.tar: cut short or changed, .* found 512"):
        Cache(copy)
    (copy / "text" / "000002.tar").unlink()
    with pytest.raises(ShardError, match=r"000002\.tar: missing, .* counts on it"):
        Cache(copy)


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A tar header, its checksum right."""
    mode, owner, time = b"0000644\0", b"0000000\0" * 2, b"00000000000\0"
    data = name.ljust(100, b"\0") + mode + owner + size + time + b" " * 8 + kind
    data = data.ljust(512, b"\0")
    return data[:148] + b"%06o\0 " % sum(data) + data[156:]


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (b"\xff" * 11 + b"\x00", b"0"),  # negative, in base 256
        (b"77777777777\0", b"0"),
        (b"00000001000\0", b"x"),  # a pax header
        (b"00000001000\0", b"2"),  # a symbolic link
        (b"not a number", b"0"),
    ],
)
def test_hostile_tar_headers_are_listed(copy: Path, size: bytes, kind: bytes) -> None:
    path = copy / "latents" / "000001.tar"
    loaded = sidecar.load(copy / "latents", 1)
    assert loaded is not None
    data = header(f"{loaded.keys[0]}.safetensors".encode(), size, kind)
    path.write_bytes(data + path.read_bytes()[512:])
    document = json.loads((copy / "latents" / "000001.json").read_text())
    document["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "latents" / "000001.json").write_text(json.dumps(document))
    reseal(copy)
    (fault,) = faults(copy)
    assert "000001.tar" in fault
    assert "tar header" in fault or "the sidecar lists" in fault


def test_bytes_between_records_and_behind_them_are_listed(copy: Path) -> None:
    path = copy / "latents" / "000001.tar"
    loaded = sidecar.load(copy / "latents", 1)
    assert loaded is not None
    whole = path.read_bytes()
    _, _, start, size = loaded.spans[0]
    for at in (start + size, len(whole) - 1):
        flip(path, at)
        reseal(copy)
        (fault,) = faults(copy)
        assert "000001.tar" in fault
        path.write_bytes(whole)


@pytest.mark.parametrize("folder", ["text", "latents", "conditioning"])
def test_a_file_in_the_place_of_a_folder(
    copy: Path, folder: str, command: Callable[..., Outcome]
) -> None:
    shutil.rmtree(copy / folder)
    (copy / folder).write_text("")
    outcome = command("shards", "verify", copy)
    assert outcome.exit_code == 1
    assert f"{copy / folder}" in outcome.output
    with pytest.raises(ShardError):
        Cache(copy)


def test_strange_names_in_an_incomplete_cache(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    for name in ("0 copy.json", "99999999999.json", "000900.json"):
        (copy / "latents" / name).write_text("")
    with pytest.raises(ShardError, match=r"latents: 3 finished, missing 000002, .*, 000009;"):
        manifest.load(copy)


def no_records_first(document: dict[str, Any]) -> None:
    counts = document["text"]["shard_records"]
    counts[0], counts[1] = 0, counts[0] + counts[1]


def one_shard_more(document: dict[str, Any]) -> None:
    product = document["conditioning"]["conditioning"]
    for name in ("shard_bytes", "shard_sha256", "sidecar_sha256", "shard_buckets"):
        product[name].append(product[name][0])
    product["shard_records"].append(0)


def bucket_beyond(document: dict[str, Any]) -> None:
    for product in (document["latents"], document["conditioning"]["conditioning"]):
        product["shard_buckets"][1] = 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (no_records_first, "is not the empty prompt"),
        (one_shard_more, "has not as many shards as latents"),
        (lambda d: d["text_spec"].update(t5_width=1 << 30), "Expected `int` <= 65536"),
        (lambda d: d["text_spec"].update(t5_width=0), "Expected `int` >= 1"),
        (
            lambda d: d["text_spec"].update(t5_width=1 << 16, max_sequence_length=1 << 16),
            "text: a record of 1717",
        ),
        (lambda d: d.pop("buckets"), "missing required field `buckets`"),
        (lambda d: d.update(buckets=[]), "Expected `array` of length >= 1"),
        (lambda d: d.update(buckets=[[8, 0]]), "Expected `int` >= 1"),
        # 16 channels of 65,536 x 257 float32 numbers.
        (lambda d: d["buckets"].append([1 << 16, 257]), "latents: a record of 1077936128 bytes"),
        (bucket_beyond, "latents: shard_buckets up to 1, of 1 buckets"),
        (
            lambda d: d["conditioning"]["conditioning"]["shard_buckets"].__setitem__(0, 1),
            "conditioning 'conditioning' has other shard_buckets than latents",
        ),
        (lambda d: d["latents"].pop("shard_buckets"), "missing required field `shard_buckets`"),
        (
            lambda d: d["validation"]["conditioning"].update(shard_buckets=[]),
            "validation/conditioning: 0 shard_buckets, 1 expected",
        ),
        (lambda d: d["latents"]["shard_buckets"].append(0), "2 shards, 3 shard_buckets"),
        (
            lambda d: d["text"].update(shard_buckets=[0] * len(d["text"]["shard_records"])),
            "text: 6 shard_buckets, 0 expected",
        ),
        (
            lambda d: d["conditioning_specs"]["conditioning"].update(latent_channels=4),
            r"'conditioning' \[4, 8, 8\] float32 beside latents \[16, 8, 8\]",
        ),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(
    copy: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    document = json.loads((copy / "manifest.json").read_text())
    edit(document)
    write_manifest(copy, document)
    with pytest.raises(ShardError, match=message):
        Cache(copy).empty_prompt_key()


def test_records_are_of_their_shards_bucket(bucketed: Path, tmp_path: Path) -> None:
    found = Cache(bucketed)
    for shard in range(7):
        for index in range(5):
            _, tensors, prompts = found.sample(shard, index)
            assert tensors["latent"].shape == (16, *BUCKETS[shard % 3])
            assert tensors["conditioning_latent"].shape == (16, *BUCKETS[shard % 3])
            assert found.embeddings(prompts[0])["t5_embeds"].shape == (20, 96)
    assert faults(bucketed) == []
    # Of equal size, with headers of equal length: only the shapes tell.
    copy = tmp_path / "cache"
    shutil.copytree(bucketed, copy)
    document = json.loads((copy / "manifest.json").read_text())
    for product in (document["latents"], document["conditioning"]["conditioning"]):
        product["shard_buckets"][1:3] = [2, 1]
    write_manifest(copy, document)
    wrong = Cache(copy)
    message = r"latent expected \[16, 12, 4\] bfloat16, found \[16, 4, 12\]"
    for _ in range(2):  # whatever was read before
        wrong.sample(4, 0)
        wrong.sample(5, 0)
        with pytest.raises(ShardError, match=rf"000001\.tar: record .*: {message}"):
            wrong.sample(1, 0)
    listed = faults(copy)
    assert len(listed) == 2 * 2 * 5
    assert re.search(message, listed[0])


def test_a_batch_is_read_into_the_memory_of_its_bucket(bucketed: Path) -> None:
    found = Cache(bucketed)
    for bucket, shards in enumerate(([0, 3], [1, 4], [2, 5])):
        batch = empty_tensors(found.sample_specs(bucket), 2)
        samples = [found.sample_records(shard, 2) for shard in shards]
        found.read(batch, samples, [sample.prompts[0] for sample in samples])
        for position, sample in enumerate(samples):
            expected = found.sample(*sample.conditioning)[1] | found.embeddings(sample.prompts[0])
            assert batch.keys() == expected.keys()
            assert all(
                torch.equal(batch[name][position], tensor) for name, tensor in expected.items()
            )


def test_info_lists_the_buckets(bucketed: Path, command: Callable[..., Outcome]) -> None:
    output = command("shards", "info", bucketed).output
    for line in ("[16, 8, 8], 15 images", "[16, 4, 12], 10 images", "[16, 12, 4], 10 images"):
        assert f"latents: {line}, posterior mean, bfloat16" in output
    values = json.loads(command("shards", "info", bucketed, "--json").output)
    assert values["buckets"] == [
        {"height": 8, "width": 8, "images": 15},
        {"height": 4, "width": 12, "images": 10},
        {"height": 12, "width": 4, "images": 10},
    ]


def test_commands(cache: Path, copy: Path, command: Callable[..., Outcome]) -> None:
    info = command("shards", "info", cache)
    assert info.exit_code == 0
    assert "conditioning/conditioning" in info.output
    values = json.loads(command("shards", "info", cache, "--json").output)
    assert values["products"]["latents"]["records"] == 10
    assert command("shards", "verify", cache).exit_code == 0
    flip(copy / "latents" / "000000.tar", 3000)
    outcome = command("shards", "verify", copy)
    assert outcome.exit_code == 1
    assert "latents/000000.tar: its sha256 is not the one in the manifest" in outcome.output
    assert "1 faults" in outcome.output
    values = json.loads(command("shards", "verify", copy, "--json").output)
    assert values["ok"] is False
    assert len(values["faults"]) == 1
    missing = command("shards", "verify", copy.parent)
    assert missing.exit_code == 2
    assert "not a cache" in missing.output
