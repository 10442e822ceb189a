"""Reading a cache: any record at once, and a clear word where something is not as it should be."""

import gc
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shards import manifest, sidecar, verify
from shards.cache import Cache
from shards.errors import ShardError
from tests.conftest import Outcome, reseal


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
    assert found.text.about(0, 0) == {"prompt": ""}
    assert found.empty_prompt().keys() == {"clip_embeds", "t5_embeds", "pooled_embeds"}


def test_an_open_cache_travels_to_a_worker(cache: Path) -> None:
    found = Cache(cache)
    expected = found.sample(1, 1)[1]["latent"]
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.sample(1, 1)[1]["latent"], expected)


def test_files_close_with_the_reader(cache: Path) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        Cache(cache).sample(0, 0)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_cache_without_the_wanted_control_names_those_it_has(cache: Path) -> None:
    with pytest.raises(ShardError, match=r"no conditioning 'depth'; found 'conditioning'"):
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
    card = sidecar.load(copy / "latents", 1)
    assert card is not None
    start, size, about, _ = card.spans[0]
    for at, message in ((start + size - 1, "its bytes are not as"), (about, "its JSON is not as")):
        flip(copy / "latents" / "000001.tar", at)
        reader = Cache(copy).latents
        with pytest.raises(ShardError, match=rf"000001\.tar: record {card.keys[0]}: {message}"):
            reader.tensors(1, 0) if at > start + 100 and at < about else reader.about(1, 0)
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
