"""The data set card: `load_dataset` gives what our reader gives, and a user's words stay."""

import shutil
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import webdataset

from common.errors import ShardError
from shards.format import manifest
from shards.format.expected_cache import read_expected
from shards.format.published import dataset_card
from shards.format.seal import seal, withdraw
from shards.reading.location import LocalFiles
from shards.reading.reader import ProductReader


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def test_load_dataset_gives_the_records_of_each_product(cache: Path, tmp_path: Path) -> None:
    files = LocalFiles(cache)
    cache_manifest = files.manifest()
    names = datasets.get_dataset_config_names(str(cache), cache_dir=tmp_path)
    assert names == ["text", "latents", "conditioning", "validation"]
    for name, (folder, product) in zip(names, cache_manifest.products(), strict=True):
        reader = ProductReader(files, folder, product, cache_manifest.specs_by_bucket(folder))
        records = iter(
            datasets.load_dataset(
                str(cache), name, split="train", streaming=True, cache_dir=tmp_path
            )
        )
        for place in reader.locations():
            record = next(records)
            told = {key: value for key, value in record["json"].items() if value is not None}
            assert told == reader.metadata(*place)
            tensors = safetensors.torch.load(record["safetensors"])
            stored = {name: data.tobytes() for name, data in reader.tensor_bytes(*place).items()}
            assert {name: each.numpy().tobytes() for name, each in tensors.items()} == stored
        assert next(records, None) is None


def test_what_only_late_records_say_is_not_dropped(copy: Path, tmp_path: Path) -> None:
    """`datasets` infers columns from five records."""
    for path in (copy / "latents").glob("*.tar"):
        path.unlink()
    told = [{"image_hash": "0"}] * 6 + [
        {"image_hash": "1", "held_out": True, "mirrored": True}
        | {"crop": [0, 1, 2, 3], "background": [1, 2, 3]}
    ]
    with webdataset.TarWriter(str(copy / "latents" / "000000.tar")) as tar:
        for number, fields in enumerate(told):
            tar.write({"__key__": f"{number}", "safetensors": b"", "json": fields})
    rows = datasets.load_dataset(
        str(copy), "latents", split="train", streaming=True, cache_dir=tmp_path
    )
    assert [row["json"] for row in rows][-1] == told[-1]


def test_a_users_words_and_fields_stay(copy: Path) -> None:
    path = copy / "README.md"
    stale = path.read_text().replace("| `latents` | ", "| `latents` | 9")
    edited = stale.replace("license: unknown", "license: cc-by-4.0") + "\nFrom *my* camera.\n"
    assert edited != stale
    path.write_text(edited)
    dataset_card.write(copy, manifest.load(copy))
    text = path.read_text()
    assert "license: cc-by-4.0\n" in text
    assert text.endswith("\nFrom *my* camera.\n")
    assert f"| `latents` | {manifest.load(copy).latents.num_records} |" in text
    assert text.count("config_name: latents") == 2  # of configs and of dataset_info


def test_a_card_without_the_markers_is_left_alone(copy: Path) -> None:
    (copy / "README.md").write_text("# Mine\n")
    dataset_card.write(copy, manifest.load(copy))
    assert (copy / "README.md").read_text() == "# Mine\n"


def test_a_card_that_is_right_is_not_written(copy: Path) -> None:
    before = copy.stat().st_mtime_ns
    dataset_card.write(copy, manifest.load(copy))
    assert copy.stat().st_mtime_ns == before


@pytest.mark.parametrize("fields", ["a: [", "- a"])
def test_front_matter_that_cannot_be_read_is_named(copy: Path, fields: str) -> None:
    path = copy / "README.md"
    path.write_text(f"---\n{fields}\n---\n{path.read_text()}")
    with pytest.raises(ShardError, match=r"README\.md: its front matter is no .*; mend it"):
        dataset_card.write(copy, manifest.load(copy))


def test_sealing_writes_it(copy: Path) -> None:
    expected, _ = read_expected(copy)
    written = (copy / "README.md").read_text()
    (copy / "README.md").unlink()
    withdraw(copy)
    seal(copy, expected)
    assert (copy / "README.md").read_text() == written


def test_configurations_are_named_after_product_and_control() -> None:
    folders = ("text", "latents", "conditioning/conditioning", "validation/depth")
    names = [dataset_card.configuration_name(folder) for folder in folders]
    assert names == ["text", "latents", "conditioning", "validation-depth"]
