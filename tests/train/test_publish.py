"""The model card, the way to the hub, and pictures decoded elsewhere."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file

from common.errors import ConfigError, RunError
from tests.conftest import PROMPTS, Outcome
from train.config import TrainConfig
from train.run import train
from train.saving import publish


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


class Hub:
    """A hub that records requests; it refuses the kind in `closed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.closed = ""
        hub = self

        class Api:
            def __init__(self, token: str | None = None) -> None:
                hub.asked.append(("login", {"token": token}))

            def create_repo(self, name: str, **more: Any) -> Any:
                return hub.note("create", name=name, **more)

            def upload_folder(self, **more: Any) -> Any:
                return hub.note("upload", **more)

        monkeypatch.setattr(publish, "HfApi", Api)

    def note(self, what: str, **more: Any) -> Any:
        if self.closed == what:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise HfHubHTTPError("403 Forbidden\nmore", response=response)
        self.asked.append((what, more))
        return SimpleNamespace(repo_id="me/out", commit_url="https://hub/me/out/commit/1")


def test_the_card_says_what_it_is_and_how_to_load_it(config: TrainConfig) -> None:
    train(config)
    card = ModelCard.load(config.output_dir / "README.md")
    assert card.data.library_name == "diffusers"
    assert "controlnet" in card.data.tags
    text = card.content
    for said in ("trained on 10 images", "64 x 64 pixels", "max_sequence_length=20", *PROMPTS):
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
    assert str(config.output_dir) not in text
    assert str(config.cache) not in text


def test_what_is_uploaded(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    train(replace(config, push_to_hub=True, hub_model_id="me/circles"))
    names = [name for name, _ in hub.asked if name != "login"]
    assert names == ["create", "create", "upload"]
    assert {more["token"] for name, more in hub.asked if name == "login"} == {"hf_secret"}
    upload = hub.asked[-1][1]
    files = [path for path in config.output_dir.rglob("*") if path.is_file()]
    sent = set(
        huggingface_hub.utils.filter_repo_objects(
            [path.relative_to(config.output_dir).as_posix() for path in files],
            allow_patterns=upload["allow_patterns"],
        )
    )
    weights = ("config.json", "diffusion_pytorch_model.safetensors")
    assert sent == {
        "README.md",
        *weights,
        *(f"controlnet_ema/{name}" for name in weights),
        *(f"validation/step-000002/{name}.png" for name in ("0", "0-ema", "1", "1-ema")),
    }


def test_a_closed_hub_is_noticed_before_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    hub.closed = "create"
    with pytest.raises(ConfigError, match=r"--push-to-hub: out cannot be made \(403 Forbidden\)"):
        train(replace(config, push_to_hub=True))
    assert not list(config.output_dir.glob("checkpoint*"))


def test_a_failed_upload_says_where_the_controlnet_is(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    hub.closed = "upload"
    with pytest.raises(RunError, match=rf"hf upload out {config.output_dir}$"):
        train(replace(config, push_to_hub=True))
    assert (config.output_dir / "config.json").is_file()


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
    assert "4 files of latents, 4 to decode" in outcome.output
    for name in ("0-ema", "0", "1-ema", "1"):
        decoded, drawn, cpu = (
            np.array(Image.open(one.output_dir / f"validation/step-000002/{name}.png"))
            for one in (kept, config, on_cpu)
        )
        assert decoded.shape == (64, 3 * 64, 3)
        assert (decoded == drawn).all()
        assert (cpu == drawn).all()
    assert "4 files of latents, 0 to decode" in command("infer", *decode, *base).output


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
    from train.validation import pictures

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_decode", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert not (config.output_dir / "validation/step-000002").exists()
    train(replace(config, resume_from_checkpoint="latest"))
    drawn = {path.name for path in (config.output_dir / "validation/step-000002").iterdir()}
    assert drawn == {"0.png", "0-ema.png", "1.png", "1-ema.png"}
