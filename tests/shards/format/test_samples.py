"""The index of samples: plain readers find by it what our reader reads; none that is stale."""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from common import claim
from common.errors import ShardError
from shards import verify
from shards.format import manifest, seal
from shards.format.expected_cache import read_expected
from shards.format.published import samples
from shards.format.published.prompt_table import PromptTable
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles
from tests.conftest import Outcome, write_manifest
from tests.shards.format.test_seal import another_control


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def rows(cache: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(cache / "samples.parquet").to_pylist()
    return found


def member(cache: Path, place: dict[str, Any], record: str = "") -> bytes:
    """Return the bytes at a place, as any program reads them."""
    with (cache / place[f"{record}file"]).open("rb") as file:
        file.seek(place[f"{record}offset"])
        return file.read(place[f"{record}size"])


def names(tar: Path, ending: str) -> Iterator[str]:
    with tarfile.open(tar) as archive:
        yield from (name for name in archive.getnames() if name.endswith(ending))


@pytest.mark.parametrize("kind", ["cache", "held_out", "bucketed"])
def test_it_joins_what_our_reader_reads(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    found = rows(folder)
    opened = Cache(LocalFiles(folder), "conditioning")
    listed = opened.manifest
    locations = [*opened.conditioning.locations()]
    assert len(found) == len(locations)
    for row, place in zip(found, locations, strict=True):
        key, tensors, prompts = opened.sample(*place)
        assert (row["control"], row["key"]) == ("conditioning", key)
        read = safetensors.torch.load(member(folder, row, "latent_"))
        read |= safetensors.torch.load(member(folder, row, "conditioning_"))
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in read)
        height, width = read["latent"].shape[1:]
        assert (row["height"], row["width"]) == (8 * height, 8 * width)
        assert row["held_out"] == (place[0] in listed.held_out)
        for record in ("latent", "conditioning"):
            path = folder / row[f"{record}_file"]
            name = [*names(path, ".safetensors")][row[f"{record}_row"]]
            assert name == f"{key}.safetensors"
        told = opened.latents.metadata(*opened.latents.locate(key))
        assert row["image_hash"] == told["image_hash"]
        assert row["mirrored"] == told.get("mirrored", False)
        assert [text["key"] for text in row["prompts"]] == prompts
        for text in row["prompts"]:
            embeds = safetensors.torch.load(member(folder, text))
            expected = opened.embeddings(text["key"])
            assert all(torch.equal(embeds[name], expected[name]) for name in expected)
            told = opened.text.metadata(*opened.text.locate(text["key"]))
            assert told == {"prompt": text["prompt"]}
            name = [*names(folder / text["file"], ".json")][text["row"]]
            assert name == f"{text['key']}.json"
    assert listed.samples is not None
    assert listed.samples.num_rows == len(found)


def test_the_fixtures_say_all_that_a_row_may_say(held_out: Path, bucketed: Path) -> None:
    assert {row["held_out"] for row in rows(held_out)} == {False, True}
    assert len({(row["height"], row["width"]) for row in rows(bucketed)}) > 1


def test_an_image_has_a_row_a_control_and_row_groups_are_filled(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(rows(copy))
    monkeypatch.setattr(samples, "ROWS_A_GROUP", count + 1)
    seal.seal(copy, another_control(copy, "canny"))
    found = rows(copy)
    first, second = (
        [row for row in found if row["control"] == name] for name in ("conditioning", "canny")
    )
    assert len(first) == count
    assert [row["key"] for row in first] == [row["key"] for row in second]
    files = {row["conditioning_file"].rpartition("/")[0] for row in second}
    assert files == {"conditioning/canny"}
    groups = pq.ParquetFile(copy / "samples.parquet").metadata
    assert groups.num_row_groups == 2
    assert groups.row_group(0).num_rows > count


def test_a_stock_reader_reads_it(cache: Path) -> None:
    table = pandas.read_parquet(cache / "samples.parquet")
    one = table[table.control == "conditioning"].iloc[0]
    assert one.prompts[0]["prompt"] in {row["prompts"][0]["prompt"] for row in rows(cache)}


def test_withdrawing_removes_it_and_sealing_writes_it_again(copy: Path) -> None:
    expected, _ = read_expected(copy)
    before = (copy / "samples.parquet").read_bytes()
    seal.withdraw(copy)
    assert not (copy / "samples.parquet").exists()
    seal.seal(copy, expected)
    assert (copy / "samples.parquet").read_bytes() == before


def test_sealing_again_writes_one_that_is_gone(copy: Path) -> None:
    before = manifest.load(copy)
    (copy / "samples.parquet").unlink()
    assert seal.seal(copy, read_expected(copy)[0]) == before
    assert (copy / "samples.parquet").exists()


def test_whoever_writes_it_is_not_taken_for_gone(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed = []
    monkeypatch.setattr(claim, "renew", lambda path: renewed.append(path.name))
    expected, _ = read_expected(copy)
    seal.withdraw(copy)
    listed = seal.seal(copy, expected)
    assert renewed == [seal.CLAIM] * (listed.text.num_shards + listed.latents.num_shards)


def test_renewing_changes_the_claim_and_makes_none(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    claim.renew(path)
    assert not path.exists()
    path.touch()
    os.utime(path, (0, 0))
    claim.renew(path)
    assert path.stat().st_mtime > 0


def without_index(cache: Path) -> None:
    """Make a cache as a former version made it."""
    (cache / "samples.parquet").unlink()
    document = json.loads((cache / "manifest.json").read_text())
    del document["samples"]
    write_manifest(cache, document)


@pytest.mark.parametrize("pulled", [False, True])
def test_a_cache_of_a_former_version_gets_one_from_the_command_alone(
    copy: Path, pulled: bool, command: Any
) -> None:
    before, listed = rows(copy), manifest.load(copy)
    without_index(copy)
    assert not [fault for _, faults in verify.faults(copy) for fault in faults]
    expected, _ = read_expected(copy)
    assert seal.seal(copy, expected).samples is None  # perhaps the disk is read-only
    assert not (copy / "samples.parquet").exists()
    if pulled:
        (copy / "plan.safetensors").unlink()
    outcome: Outcome = command("shards", "seal", copy)
    assert outcome.exit_code == 0, outcome.output
    assert "complete, 10 pairs" in outcome.output
    assert rows(copy) == before
    assert manifest.load(copy) == listed


def test_one_that_is_changed_or_gone_is_told_and_mended(copy: Path) -> None:
    path = copy / "samples.parquet"
    data = path.read_bytes()
    for spoil, told in (
        (lambda: path.write_bytes(data[:-1] + b"?"), "sha256"),
        (lambda: path.unlink(), "missing, though"),
    ):
        spoil()
        (fault,) = [fault for _, faults in verify.faults(copy) for fault in faults]
        assert fault.startswith(f"{path}: ")
        assert told in fault
        assert "shards seal writes it anew" in fault
        seal.complete(copy)
        assert path.read_bytes() == data


def test_a_damaged_or_missing_record_is_named(copy: Path) -> None:
    found = manifest.load(copy)
    row = rows(copy)[0]
    tar = copy / row["prompts"][0]["file"]
    data = tar.read_bytes()
    tar.write_bytes(data.replace(b'"prompt"', b'"prompy"'))
    with pytest.raises(ShardError, match=rf"{tar}: record .*: its JSON is damaged"):
        samples.write(copy, found)
    tar.write_bytes(data)
    sidecar = copy / "latents" / "000000.json"
    document = json.loads(sidecar.read_text())
    for key in ("009999-00000-0000000000000000", row["prompts"][0]["key"][:-16] + "0" * 16):
        document["prompts"][0] = [key]
        sidecar.write_text(json.dumps(document))
        with pytest.raises(ShardError, match=f"text: a caption's record {key} is missing"):
            samples.write(copy, found)
    assert not list(copy.glob("samples.parquet.tmp-*"))


def test_a_control_without_its_image_is_named(copy: Path) -> None:
    path = copy / "latents" / "000000.json"
    document = json.loads(path.read_text())
    gone = document["keys"][-1]
    for name in ("keys", "spans", "checksums", "prompts"):
        document[name].pop()
    path.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=f"latents: the image {gone} of conditioning is missing"):
        samples.write(copy, manifest.load(copy))


def test_no_prompts_at_all(tmp_path: Path) -> None:
    with (tmp_path / "words").open("w+b") as words:
        table = PromptTable([], words)
        assert len(table.places([])) == 0
        with pytest.raises(ShardError, match="is missing"):
            table.places(["000000-00000-0000000000000000"])
