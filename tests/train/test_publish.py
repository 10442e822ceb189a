"""The model card, the way to the hub, and pictures decoded elsewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from common.errors import ConfigError, RunError
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from shards.remote import retry
from tests.conftest import PROMPTS, Outcome, free_port
from tests.hub_server import Hub
from train import run
from train.config import TrainConfig
from train.run import train
from train.saving.card_base import CardBase, hub_name
from train.saving.card_example import example
from train.saving.model_card import write_card


@pytest.fixture
def config(train_config: TrainConfig) -> TrainConfig:
    return replace(
        train_config,
        max_train_steps=2,
        validation_steps=2,
        num_validation_images=2,
        validation_inference_steps=2,
        ema_decay=0.5,
        hub_token="hf_secret",
    )


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def quick(train_config: TrainConfig) -> TrainConfig:
    """A step without pictures, to be uploaded."""
    return replace(train_config, max_train_steps=1, push_to_hub=True)


def unplug(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the network away: nobody listens where the hub was."""
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nobody)


def test_the_card_says_what_it_is_and_how_to_load_it(
    config: TrainConfig, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    # Every option that is a path, now and in future.
    paths = {entry.name for entry in fields(TrainConfig) if "Path" in str(entry.type)}
    private = {name: tmp_path / name for name in paths - {"transformer"}}
    zeros = replace(config, pooled_projection="zeros")
    train(replace(zeros, **private, logging_dir="my-logs", validation_steps=1))
    config = replace(config, output_dir=tmp_path / "output_dir")
    card = ModelCard.load(config.output_dir / "README.md")
    assert card.data.library_name == "diffusers"
    assert "controlnet" in card.data.tags
    text = card.content
    for said in (
        "trained on 10 pairs of an image and its control",
        "64 x 64 pixels",
        "diffusers and ComfyUI give it what it was trained with",
        "max_sequence_length=20",
        *PROMPTS,
    ):
        assert said in text
    data = json.loads((config.output_dir / "config.json").read_text())["_precompute"]
    assert data["latents_fingerprint"] in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == [
        f"validation/step-000002/{name}.png" for name in ("0-ema", "0", "1-ema", "1")
    ]
    assert all((config.output_dir / path).is_file() for path in pictures)
    assert "controlnet_ema" in text
    # Nothing that was not meant for others.
    everything = [path for path in config.output_dir.rglob("*") if path.is_file()]
    assert not [path for path in everything if b"hf_secret" in path.read_bytes()]
    assert str(tmp_path_factory.getbasetemp()) not in text
    settings = dict(re.findall(r"^    (\w+) = (.*)$", text, re.MULTILINE))
    assert settings["learning_rate"] == "0.001"
    assert settings["num_controlnet_layers"] == "2"
    assert not paths & settings.keys()
    assert "my-logs" not in text


@pytest.mark.parametrize("decode", ["vae", "latents"])
def test_the_card_gives_pictures_the_prompts_that_they_were_drawn_from(
    config: TrainConfig,
    precompute_config: PrecomputeConfig,
    command: Callable[..., Outcome],
    tmp_path: Path,
    decode: Literal["vae", "latents"],
) -> None:
    train(replace(config, ema_decay=None, validation_decode=decode))
    if decode == "latents":
        base = ("--pretrained-model-name-or-path", config.pretrained_model_name_or_path)
        outcome = command(
            "infer", "decode", "--output-dir", config.output_dir, "--device", "cpu", *base
        )
        assert outcome.exit_code == 0, outcome.output
    cache = Path(shutil.copytree(config.cache[0], tmp_path / "cache"))
    precompute(
        replace(
            precompute_config,
            cache=cache,
            validation_prompt=("something else",),
            validation_image=precompute_config.validation_image[:1],
        )
    )
    longer = replace(
        config,
        ema_decay=None,
        cache=(str(cache),),
        max_train_steps=3,
        validation_steps=0,
        resume_from_checkpoint="latest",
    )
    train(longer)
    text = (config.output_dir / "README.md").read_text()
    for number, prompt in enumerate(PROMPTS):
        assert f"{prompt}\n\n![{number}](validation/step-000002/{number}.png)" in text
    assert "something else" not in text
    assert "what came of it after 2 steps" in text
    # Without a prompt of its own a picture is left out.
    for path in (config.output_dir / "validation/step-000002").iterdir():
        Image.new("RGB", (8, 8)).save(path) if path.suffix == ".png" else path.unlink()
    train(replace(longer, max_train_steps=4))
    assert "None were drawn" in (config.output_dir / "README.md").read_text()


def test_what_is_uploaded(hub: Hub, config: TrainConfig) -> None:
    tokens: set[str | None] = set()
    hub.misbehave = lambda handler, *_: tokens.add(handler.headers["Authorization"]) is not None
    train(replace(config, push_to_hub=True, hub_token="hf_option"))
    assert tokens - {None} == {"Bearer hf_option"}  # not HF_TOKEN, which is hf_secret
    sent = hub.files("models/me/out")
    weights = ("config.json", "diffusion_pytorch_model.safetensors")
    assert set(sent) == {
        "README.md",
        *weights,
        *(f"controlnet_ema/{name}" for name in weights),
        *(f"validation/step-000002/{name}.png" for name in ("0", "0-ema", "1", "1-ema")),
    }
    for name, data in sent.items():
        assert data == (config.output_dir / name).read_bytes()


def test_the_card_of_an_upload_names_what_others_can_load(
    hub: Hub, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "my-base"
    shutil.copytree(quick.pretrained_model_name_or_path, base)
    monkeypatch.chdir(tmp_path)
    quick = replace(quick, pretrained_model_name_or_path="my-base")
    train(quick)
    text = (quick.output_dir / "README.md").read_text()
    assert 'SD3ControlNetModel.from_pretrained("me/out", dtype=torch.float16)' in text
    assert '    "path/to/my-base", controlnet=controlnet, dtype=torch.float16' in text
    assert str(tmp_path) not in text
    assert "pretrained_model_name_or_path =" not in text
    index = json.loads((base / "model_index.json").read_text())
    index["_name_or_path"] = "stabilityai/stable-diffusion-3.5-medium"
    (base / "model_index.json").write_text(json.dumps(index))
    hub.add("models/lab/circles", {"earlier.txt": b"there before"})
    before = str(quick.output_dir)
    again = replace(quick, controlnet_model_name_or_path=before, output_dir=tmp_path / "again")
    train(replace(again, hub_model_id="lab/circles"))
    card = ModelCard(hub.files("models/lab/circles")["README.md"].decode())
    assert card.data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert 'from_pretrained("lab/circles", dtype=torch.float16)' in card.content
    assert '    "stabilityai/stable-diffusion-3.5-medium", controlnet' in card.content
    assert before not in card.content
    assert str(tmp_path) not in card.content


def test_the_example_has_the_pictures_sides() -> None:
    text = example(
        "lab/circles",
        CardBase("base", None, None, [], {}),
        {"height": 64, "width": 96, "max_sequence_length": 9},
        inpainting=False,
    )
    assert "size = (96, 64)  #" in text
    assert "max_sequence_length=9,  #" in text


def test_a_base_in_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--base-3" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    assert hub_name(str(snapshot)) == "some/base-3"
    assert hub_name("some/base-3") == "some/base-3"
    assert hub_name(str(tmp_path)) is None
    copied = {"_name_or_path": f"{snapshot}/transformer"}
    (tmp_path / "model_index.json").write_text(json.dumps(copied))
    assert hub_name(str(tmp_path)) == "some/base-3"


@pytest.mark.usefixtures("patience")
def test_a_closed_hub_is_noticed_before_training(
    hub: Hub, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.misbehave = lambda handler, *_: handler.refuse(403) is None
    start = r"^--push-to-hub: no repository out: "
    with pytest.raises(ConfigError, match=start + r"the server answers 403 .*`hf auth login`"):
        train(quick)
    unplug(hub, monkeypatch)
    with pytest.raises(ConfigError, match=start + r"ConnectError: .*Check the network") as raised:
        train(quick)
    assert "\n" not in str(raised.value)
    assert not list(quick.output_dir.glob("checkpoint*"))


@pytest.mark.usefixtures("patience")
def test_a_failed_upload_says_where_the_controlnet_is_and_how_to_send_it(
    hub: Hub, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def saved(*_: object) -> None:
            write_card(*_)
            unplug(hub, patch)

        patch.setattr(run, "write_card", saved)
        with pytest.raises(RunError, match="The ControlNet is safe in") as raised:
            train(quick)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith("--push-to-hub: not uploaded to me/out: ConnectError: ")
    # The line is typed once the network is back.
    _, _, typed = line.partition("to upload it: ")
    arguments = shlex.split(typed)
    tool = Path(sys.executable).with_name(arguments[0])
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    subprocess.run([tool, *arguments[1:]], env=environment, check=True, capture_output=True)
    weights = ("config.json", "diffusion_pytorch_model.safetensors")
    assert set(hub.files("models/me/out")) == {"README.md", *weights}


@pytest.mark.slow
def test_latents_that_were_kept_are_decoded_elsewhere(
    config: TrainConfig, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    train(config)
    kept = replace(config, output_dir=tmp_path / "kept", validation_decode="latents")
    train(kept)
    on_cpu = replace(config, output_dir=tmp_path / "cpu", validation_decode="cpu")
    train(on_cpu)
    folder = kept.output_dir / "validation/step-000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.safetensors" for name in ("0-ema", "0", "1-ema", "1")
    ]
    assert load_file(folder / "0.safetensors")["latents"].shape == (2, 16, 8, 8)
    decode = ("decode", "--output-dir", kept.output_dir, "--device", "cpu")
    base = ("--pretrained-model-name-or-path", config.pretrained_model_name_or_path)
    outcome = command("infer", *decode, *base)
    assert outcome.exit_code == 0, outcome.output
    assert "6 files of latents, 6 to decode" in outcome.output  # two of step 0
    vae = AutoencoderKL.from_pretrained(config.pretrained_model_name_or_path, subfolder="vae")
    for name in ("0-ema", "0", "1-ema", "1"):
        decoded, drawn, cpu = (
            np.array(Image.open(one.output_dir / f"validation/step-000002/{name}.png"))
            for one in (kept, config, on_cpu)
        )
        assert decoded.shape == (64, 3 * 64, 3)
        assert (decoded == drawn).all()
        assert (cpu == drawn).all()
        # And as the stock VAE decodes them: bytes of (x + 1) / 2, but for a rounding.
        saved = load_file(folder / f"{name}.safetensors")
        with torch.no_grad():
            pixels = vae.decode(saved["latents"].float()).sample
        expected = torch.cat([*(127.5 * (pixels.clamp(-1, 1) + 1))], dim=2).permute(1, 2, 0)
        assert np.abs(drawn[:, 64:] - expected.numpy()).max() <= 1
        assert (drawn[:, :64] == saved["conditioning_image"].permute(1, 2, 0).numpy()).all()
        assert expected.std() > 1
    assert "6 files of latents, 0 to decode" in command("infer", *decode, *base).output


def test_nothing_to_decode_says_what_makes_it(
    command: Callable[..., Outcome], base: Path, tmp_path: Path
) -> None:
    arguments = ("--output-dir", tmp_path, "--pretrained-model-name-or-path", base)
    outcome = command("infer", "decode", *arguments)
    assert outcome.exit_code == 2
    assert "train writes them with --validation-decode latents" in outcome.output
    (tmp_path / "validation/step-000001").mkdir(parents=True)
    (tmp_path / "validation/step-000001/0.safetensors").write_bytes(b"no")
    outcome = command("infer", "decode", *arguments)
    assert outcome.exit_code == 2
    assert "0.safetensors: damaged" in outcome.output


def test_a_validation_cut_short_is_repeated_on_resuming(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one before training, which a checkpoint follows, is not."""
    from train.validation import pictures

    decode, folder = pictures._decode, config.output_dir / "validation"

    def killed_after_the_first(*args: Any) -> Any:
        if (folder / "step-000000").exists():
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_decode", killed_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (folder / "step-000002").exists()
    drawn_at = (folder / "step-000000/0.png").stat().st_mtime_ns
    train(replace(config, resume_from_checkpoint="latest"))
    assert (folder / "step-000000/0.png").stat().st_mtime_ns == drawn_at
    drawn = {path.name for path in (config.output_dir / "validation/step-000002").iterdir()}
    assert drawn == {"0.png", "0-ema.png", "1.png", "1-ema.png"}
