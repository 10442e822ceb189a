"""The recipes of docs/caches.md for other readers give every sample that is not held out."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from shards import verify
from shards.reading.cache import Cache
from shards.reading.location import LocalFiles
from tests.conftest import REPOSITORY, run_python

PAGE = (REPOSITORY / "docs" / "caches.md").read_text(encoding="utf-8")


def code(package: str) -> str:
    """Return the page's snippet that imports a package."""
    (found,) = [
        each
        for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
        if re.search(rf"^(import {package}|from megatron import {package})$", each, re.MULTILINE)
        and (package == "energon" or "energon" not in each)
    ]
    return str(found)


@pytest.fixture
def folder(held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `cache` is a cache of which some samples are held out of training."""
    shutil.copytree(held_out, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path


def expected(cache: Path) -> dict[str, tuple[str, dict[str, torch.Tensor]]]:
    """Return prompt and tensors of the samples for training, by key, as our reader reads them."""
    opened = Cache(LocalFiles(cache), "conditioning")
    found = {}
    for shard, index in opened.conditioning.locations():
        if shard not in opened.manifest.held_out:
            key, tensors, prompts = opened.sample(shard, index)
            prompt = opened.text.metadata(*opened.text.locate(prompts[0]))["prompt"]
            found[key] = prompt, tensors | opened.embeddings(prompts[0])
    assert 0 < len(found) < opened.latents.product.num_records
    return found


def check(given: list[tuple[str, str, dict[str, torch.Tensor]]], folder: Path) -> None:
    """Compare what a recipe gave with what our reader reads."""
    wanted = expected(folder / "cache")
    assert sorted(key for key, _, _ in given) == sorted(wanted)
    for key, prompt, tensors in given:
        assert prompt == wanted[key][0]
        assert tensors.keys() == wanted[key][1].keys()
        assert all(torch.equal(tensors[name], each) for name, each in wanted[key][1].items())


@pytest.mark.parametrize("package", ["pandas", "webdataset", "datasets"])
def test_a_recipe_gives_each_sample_once(package: str, folder: Path) -> None:
    given: list[tuple[str, str, dict[str, torch.Tensor]]] = []
    names: dict[str, Any] = {"print": lambda *_: None}
    if package != "pandas":
        exec(compile(code("pandas"), "pandas", "exec"), names)
    names["print"] = lambda key, prompt, _: given.append((key, prompt, names["sample"]))
    exec(compile(code(package), package, "exec"), names)
    check(given, folder)


@pytest.mark.extras
def test_energons_recipe_gives_each_sample_once(folder: Path) -> None:
    pytest.importorskip("megatron.energon")
    commands = re.findall(r"^    (energon prepare .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        program, *arguments = shlex.split(command)
        path = Path(sys.executable).with_name(program)
        subprocess.run([path, *arguments], check=True, capture_output=True, cwd=folder)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "cache" / "energon.yaml").write_text(yaml)
    # In a process of its own: it warns on import, which tests take for an error.
    saved = "batches.append(dict(batch, __restore_key__=0, __sources__=0, __subflavors__=0))"
    recipe = re.sub(r"print\(.*\)$", saved, code("energon"), flags=re.MULTILINE)
    assert saved in recipe
    script = f"batches = []\n{recipe}\nimport torch\ntorch.save(batches, 'batches.pt')\n"
    done = run_python("-c", script, cwd=folder)
    assert done.returncode == 0, done.stderr
    given = []
    for batch in torch.load(folder / "batches.pt", weights_only=True):
        names = [name for name in batch if not name.startswith("__") and name != "prompt"]
        for index, key in enumerate(batch["__key__"]):
            tensors = {name: batch[name][index] for name in names}
            given.append((key, batch["prompt"][index], tensors))
    check(given, folder)
    assert not [fault for _, faults in verify.faults(folder / "cache") for fault in faults]


def test_datasets_gets_the_same_fields_of_records_that_have_different_ones(folder: Path) -> None:
    files = LocalFiles(folder / "cache")
    listed = files.manifest()
    rows = datasets.load_dataset("cache", "latents", split="train", streaming=True)
    told = [(row["__key__"], row["json"]) for row in rows]
    assert len({frozenset(fields) for _, fields in told}) == 1
    held_out = [int(key.partition("-")[0]) for key, fields in told if fields["held_out"]]
    expected_shards = [
        shard for shard in listed.held_out for _ in range(listed.latents.shard_records[shard])
    ]
    assert held_out == expected_shards != []
