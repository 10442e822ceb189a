"""Finding base models: folders, hub ids, and only what a stage needs of them."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from common.errors import ConfigError
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.fingerprint import hash_component
from sd3.base.find import find_base
from sd3.pretrained import component_variant, find_controlnet
from tests.hub_server import Hub

HUB_FILES = (
    "model_index.json",
    "README.md",
    "sd3_medium.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
)


@pytest.fixture
def some_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub that holds `some/model`; downloads filter as huggingface_hub's do."""

    def download(repo: str, **options: Any) -> str:
        assert repo == "some/model"
        chosen = huggingface_hub.utils.filter_repo_objects(
            HUB_FILES,
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
        for name in chosen:
            path = tmp_path / "snapshot" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: list(HUB_FILES))
    return tmp_path / "snapshot"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_the_needed_folders_are_downloaded(some_model: Path) -> None:
    assert find_base("some/model", ("vae", "text_encoder_3")) == some_model
    assert files(some_model) == {
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder_3/config.json",
        "text_encoder_3/model-00001-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json",
    }


def test_a_variant_is_taken_where_there_is_one(some_model: Path) -> None:
    find_base("some/model", ("vae", "text_encoder_3"), variant="fp16")
    assert {name for name in files(some_model) if name.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    }
    assert component_variant(some_model / "vae", "fp16") is None
    assert component_variant(some_model / "text_encoder_3", "fp16") == "fp16"
    assert component_variant(some_model / "text_encoder_3", None) is None


def test_a_gated_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> str:
        error = GatedRepoError.__new__(GatedRepoError)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(ConfigError, match=r"'some/model' is gated: accept .* `hf auth login`"):
        find_base("some/model", ("vae",))


def test_no_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="the hub could not be reached"):
        find_base("some/model", ("vae",))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("https://huggingface.co/x/y/blob/main/sd3.safetensors", "a web address. Download the"),
        ("sd3.gguf", r"GGUF's numbers are not read here\. .* as \.safetensors; --quantize-base"),
        ("sd3.ckpt", r"a pickled file, .* Give the model as \.safetensors\."),
        ("missing.safetensors", r"no such file\."),
    ],
)
def test_files_that_are_not_read_say_what_to_give(
    name: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("sd3.gguf", "sd3.ckpt"):
        Path(file).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"^base model '{name}': {advice}"):
        find_base(name, ("vae",))
    with pytest.raises(ConfigError, match=rf"^--controlnet '{name}': {advice}"):
        find_controlnet(name, "--controlnet")


def test_a_controlnet_in_one_file_is_sent_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "controlnet.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a file, and the folder that holds it with its config"):
        find_controlnet(str(file), "--controlnet")


def test_raw_weights_are_called_so(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "raw.safetensors").write_bytes(b"")
    hub.add("models/some/raw", {"raw.safetensors": b"x", "vae_notes.txt": b"", "README.md": b""})
    for name, file in ((str(tmp_path), f"{tmp_path}/raw.safetensors"), ("some/raw", "raw.safeten")):
        with pytest.raises(
            ConfigError,
            match=rf"'{name}': raw weights \(raw\.safetensors\), without the configurations .* "
            rf"Give a one-file checkpoint itself \({file}",
        ):
            find_base(name, ("vae", "transformer"))
    hub.add("models/some/other", {"model_index.json": b"{}", "x.safetensors": b"x"})
    with pytest.raises(ConfigError, match="no vae/ in it; found no folders"):
        find_base("some/other", ("vae",))
    hub.add("models/some/notes", {"README.md": b""})
    with pytest.raises(ConfigError, match="no vae/ in it; found no folders"):
        find_base("some/notes", ("vae",))


def test_a_connection_that_breaks_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.add("models/some/model", {"vae/config.json": b"{}", "vae/m.safetensors": b"x" * 100})

    def drops(handler: Any, asked: str, before: int) -> bool:
        if "/cdn/" not in asked:
            return False
        handler.close_connection = True
        return True

    hub.misbehave = drops
    with pytest.raises(ConfigError, match=r"'some/model'.*the hub could not be reached \(Remote"):
        find_base("some/model", ("vae",))


def test_a_full_disk_is_not_called_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left"):
        find_base("some/model", ("vae",))


def test_a_controlnet_folder_is_told_from_its_run_folder(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoint-20" / "controlnet"
    inner.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no ControlNet in it\. Did you mean .*checkpoint-20"):
        find_controlnet(str(tmp_path), "--controlnet")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (inner / name).write_text("{}")
    for name in (inner, inner.parent):  # training goes on from a checkpoint's folder too
        assert find_controlnet(str(name), "--controlnet-model-name-or-path") == inner


def test_a_fingerprint_counts_weights_not_names(base: Path, tmp_path: Path) -> None:
    remembered = DigestCache(tmp_path / "hashes.npy")

    def hashed(folder: Path, variant: str | None = None) -> str:
        return hash_component(folder, variant, remembered)

    before = hashed(base / "vae")
    copy = tmp_path / "renamed"
    shutil.copytree(base / "vae", copy)
    config = copy / "config.json"
    config.write_text(config.read_text().replace("0.42", "0.99").replace("{", '{"_name": "x",', 1))
    assert hashed(copy) == before
    (copy / "model.fp16.safetensors").write_bytes(b"other weights")
    assert hashed(copy) == before
    assert hashed(copy, "fp16") != before
    weights = copy / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert hashed(copy) != before
