"""What drawing takes: estimated from configurations, measured, and chosen by."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import RunError
from common.memory.meter import Meter
from common.memory.need import Need
from infer.config import GenerateConfig, ScoreConfig
from infer.drawing.generate import generate
from infer.loaded_base import LoadedBase
from infer.memory import estimate
from infer.memory.estimate import choose_offload, find_drawings, need, remedies
from infer.memory.simulation import (
    CONTROLNET,
    CONTROLS,
    DECODING,
    DENOISING,
    PROMPTS,
    TEXT,
    TRANSFORMER,
    VAE,
    Bytes,
    Drawing,
)
from precompute.memory.layer_groups import host_peak
from tests.conftest import PROMPTS as TEXTS
from tests.conftest import TOKENS, Outcome


@pytest.fixture
def config(base: Path, controlnet: Path, circles: Path, tmp_path: Path) -> GenerateConfig:
    return GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "images",
        prompt=TEXTS[:1],
        image=(circles / "source" / "0.png",),
        seed=(7, 8),
        batch_size=2,
        num_inference_steps=3,
        dtype="float32",
        device="cpu",
    )


def drawing(**activations: int) -> Drawing:
    """Return a drawing of small numbers."""
    models = {
        TEXT: Bytes(1000, 300, 1000, 500),
        CONTROLNET: Bytes(200, 20, 200),
        TRANSFORMER: Bytes(100, 10, 400),
        VAE: Bytes(50, 50, 50),
    }
    activations = {PROMPTS: 1, CONTROLS: 2, DENOISING: 3, DECODING: 4} | activations
    return Drawing(models, activations, (64, 64), 1)


def test_what_stands_together() -> None:
    sums = {
        offload: [sum(parts.values()) for parts in drawing().moments(offload).values()]
        for offload in estimate.OFFLOADS
    }
    assert sums == {
        "none": [1351, 1352, 1353, 1354],
        "model": [301, 52, 303, 54],
        "groups": [331, 82, 33, 84],
    }
    assert drawing().peak("model") == 303
    assert drawing().host("none") == 1650  # before the transformer is quantised
    for offload in ("model", "groups"):  # after it is
        assert drawing().host(offload) == 1850


def test_auto_takes_the_fastest_that_fits(config: GenerateConfig) -> None:
    several = [drawing(), drawing(decoding=2000)]
    whole, lean = Need(1350 + 2000).free, Need(50 + 2000).free
    assert choose_offload(config, several, None) == "none"
    assert choose_offload(config, several, whole) == "none"
    assert choose_offload(config, several, whole - 1) == "model"
    assert choose_offload(config, several, lean) == "model"
    assert choose_offload(config, several, 0) == "model"  # the leanest, here
    denoising = [drawing(denoising=2000)]
    assert choose_offload(config, denoising, Need(300 + 2000).free - 1) == "groups"
    compiled = replace(config, compile=True)
    assert choose_offload(compiled, denoising, 0) == "model"


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_a_batch_takes_as_much_as_estimated(config: GenerateConfig, guidance: float) -> None:
    config = replace(config, guidance_scale=guidance)
    (found,) = find_drawings(config)
    folders = [Path(config.controlnet[0])]
    loaded = LoadedBase(config, Path(config.pretrained_model_name_or_path), [folders], batch_size=2)
    pipeline: Any = loaded.with_controlnets(folders)
    names = {
        TEXT: ("text_encoder", "text_encoder_2", "text_encoder_3"),
        CONTROLNET: ("controlnet",),
        TRANSFORMER: ("transformer",),
        VAE: ("vae",),
    }
    models = {
        part: [getattr(pipeline, name) for name in components] for part, components in names.items()
    }
    peaks: dict[str, int] = {}
    with torch.no_grad(), Meter() as meter:
        for part, ones in models.items():
            tensors = [one for model in ones for one in (*model.parameters(), *model.buffers())]
            assert sum(one.nbytes for one in tensors) == found.models[part].whole
            for one in tensors:
                meter.count(one, part)
        layers = [one.nbytes for one in pipeline.text_encoder_3.encoder.block.parameters()]
        assert found.models[TEXT].moving == host_peak(layers) - sum(layers)
        now = PROMPTS

        def enter(moment: str) -> None:
            nonlocal now
            peak = meter.peak.get("activations", 0)
            peaks[now] = max(peaks.get(now, 0), peak)
            meter.reset_peak()
            now = moment

        encode, decode = pipeline.vae.encode, pipeline.vae.decode
        pipeline.vae.encode = lambda *given: (enter(CONTROLS), encode(*given))[1]
        pipeline.vae.decode = lambda *given, **named: (enter(DECODING), decode(*given, **named))[1]
        pipeline.controlnet.register_forward_pre_hook(lambda *_: enter(DENOISING))
        meter.reset_peak()
        found_embeds = pipeline.encode_prompt(
            *[[TEXTS[0]] * 2] * 3,
            do_classifier_free_guidance=guidance > 1,
            max_sequence_length=TOKENS,
        )
        kinds = ("", "negative_", "pooled_", "negative_pooled_")
        embeds = {
            f"{kind}prompt_embeds": tensor
            for kind, tensor in zip(kinds, found_embeds, strict=True)
            if tensor is not None
        }
        del found_embeds
        enter(CONTROLS)
        pipeline(
            **embeds,
            control_image=torch.rand(2, 3, *(found.picture[::-1])),
            width=found.picture[0],
            height=found.picture[1],
            num_inference_steps=3,
            guidance_scale=guidance,
            output_type="pt",
        )
        enter(PROMPTS)
    for moment in (CONTROLS, DENOISING, DECODING):
        expected = found.activations[moment]
        assert peaks[moment] == pytest.approx(expected, rel=0.03), moment
    # Of prompts, activations are next to nothing beside the weights.
    text = found.models[TEXT].whole
    expected = found.activations[PROMPTS] + text
    assert peaks[PROMPTS] + text <= expected * 1.03
    if guidance > 1:  # prompts are encoded twice, as the estimate takes it
        assert peaks[PROMPTS] + text >= expected * 0.97


@pytest.mark.slow
def test_an_estimate_needs_configurations_alone(
    base: Path,
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(estimate, "REMEDIES", ({"offload": "groups"},))
    bare = tmp_path / "bare"
    for path in base.rglob("*.json"):
        (bare / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, bare / path.relative_to(base))
    for name in ("generate", "score", "serve"):
        done = command("infer", name, "--estimate", "--pretrained-model-name-or-path", bare)
        assert done.exit_code == 0, done
        assert "--offload none, in GB:" in done.output
        assert "between tensors and what CUDA takes" in done.output
        assert "--offload groups" in done.output
        assert ("--cache CACHE" in done.output) == (name == "generate")
        assert ("20 pictures" in done.output) == (name == "score")
    assert not list(bare.rglob("*.safetensors"))
    wrong = command("infer", "generate", "--estimate", "--pretrained-model-name-or-path", "nobody")
    assert wrong.exit_code == 2
    assert "no such folder" in wrong.output
    missing = command("infer", "generate", "--pretrained-model-name-or-path", bare)
    assert "--controlnet" in missing.output
    assert "--output-dir" in missing.output


@pytest.mark.slow
def test_what_needs_less(config: GenerateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    some = tuple(change for change in estimate.REMEDIES if change.get("quantize_base") != "nf4")
    monkeypatch.setattr(estimate, "REMEDIES", some)
    plain = replace(config, estimate=True, offload="none")
    whole = need(plain, None).device
    assert need(replace(plain, guidance_scale=1.0), None).device < whole
    offered = [flags.split()[0] for flags, _ in remedies(plain)]
    assert {"--dtype", "--batch-size", "--cache", "--offload"} <= set(offered)
    savings = [saved for _, saved in remedies(plain)]
    assert savings == sorted(savings, reverse=True)
    lean = replace(plain, dtype="bfloat16", batch_size=1, cache="cache", offload="groups")
    assert not {"--dtype", "--batch-size", "--cache", "--offload"} & {
        flags.split()[0] for flags, _ in remedies(lean)
    }


def test_the_vae_takes_a_picture_of_a_batch_at_a_time(config: GenerateConfig) -> None:
    (two,), (one,) = (find_drawings(replace(config, batch_size=count)) for count in (2, 1))
    for moment in (CONTROLS, DECODING):
        assert two.activations[moment] < 1.5 * one.activations[moment]


def test_what_auto_became_is_said(config: GenerateConfig) -> None:
    auto = replace(config, offload="auto")
    assert need(auto, None).chosen == ""
    assert need(auto, 0).chosen.startswith("--offload ")
    assert need(replace(config, offload="model"), 0).chosen == ""


@pytest.mark.slow
def test_a_full_memory_names_what_is_not_set(
    config: GenerateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = ({"batch_size": 1}, {"dtype": "bfloat16"}, {"offload": "groups"})
    monkeypatch.setattr(estimate, "REMEDIES", some)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr("infer.drawing.generate.draw", full)
    with pytest.raises(RunError, match=r"out of memory: CUDA out of memory\. ") as caught:
        generate(replace(config, dtype="bfloat16", offload="none"))
    message = str(caught.value)
    assert "--batch-size 1" in message
    assert "--offload groups" in message
    assert "--dtype" not in message


@pytest.mark.slow
def test_a_score_of_checkpoints_takes_the_largest(config: GenerateConfig, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(config.controlnet[0], small)
    saved = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(saved | {"num_layers": 1}))
    scored = ScoreConfig(
        pretrained_model_name_or_path=config.pretrained_model_name_or_path,
        controlnet=(str(small), *config.controlnet),
        output_dir=tmp_path,
        source=tmp_path,
        dtype="float32",
        batch_size=2,
    )
    alone = replace(scored, controlnet=config.controlnet)
    assert need(scored, None).device == need(alone, None).device
    together = replace(config, controlnet=scored.controlnet, combine=True)
    assert need(together, None).device > need(config, None).device
