"""A base without T5, and --no-t5: zeros for T5's embedding, as the stock pipeline has them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file

from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.base.without_t5 import lists_t5
from sd3.pretrained import DATA_KEY
from sd3.prompt_embeds import record_embeds
from shards import verify
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, TOKENS, Outcome, flags, four_steps
from train.run import train

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def without_t5(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as diffusers saves it without T5."""
    folder = tmp_path_factory.mktemp("without-t5") / "base"
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(folder)
    assert not (folder / "text_encoder_3").exists()
    return folder


@pytest.fixture(scope="module")
def cached(
    without_t5: Path, precompute_config: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("cached-without-t5") / "cache"
    config = replace(precompute_config, cache=folder, pretrained_model_name_or_path=str(without_t5))
    precompute(replace(config, validation_rows=2))
    return folder


def test_the_cache_holds_what_the_stock_pipeline_encodes(cached: Path, without_t5: Path) -> None:
    found = Cache(cached)
    assert found.manifest.text_spec.without_t5
    assert [fault for _, faults in verify.faults(cached) for fault in faults] == []
    assert "t5_embeds" not in found.text.tensors(0, 0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        without_t5, text_encoder_3=None, tokenizer_3=None
    )
    for prompt in ("", *PROMPTS):
        key = found.find_prompt(prompt)
        record = found.embeddings(key) if key else found.pair(0, PROMPTS.index(prompt))
        with torch.no_grad():
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompt, None, None, max_sequence_length=TOKENS
            )
        torch.testing.assert_close(record_embeds(record)[None], embeds)
        torch.testing.assert_close(record["pooled_embeds"][None], pooled)


def test_a_base_with_t5_gives_the_same_with_no_t5(
    cached: Path, precompute_config: PrecomputeConfig, tmp_path: Path
) -> None:
    precompute(replace(precompute_config, cache=tmp_path / "cache", t5=False, validation_rows=2))
    ours, theirs = Cache(tmp_path / "cache").manifest, Cache(cached).manifest
    assert ours.text.shard_sha256 == theirs.text.shard_sha256
    assert ours.latents.shard_sha256 == theirs.latents.shard_sha256
    assert ours.text_spec == theirs.text_spec


def test_records_take_the_room_of_clip_alone(cached: Path, cache: Path) -> None:
    sizes = [Cache(folder).manifest.text.num_bytes for folder in (cached, cache)]
    spec = Cache(cache).manifest.text_spec
    count = Cache(cache).manifest.text.num_records
    assert sizes[1] - sizes[0] >= count * spec.max_sequence_length * spec.t5_width * 4


def test_training_and_drawing_do_without(
    cached: Path, without_t5: Path, tmp_path: Path, circles: Path
) -> None:
    config = replace(four_steps(without_t5, cached, tmp_path / "out"), validation_steps=4)
    config = replace(config, num_validation_images=1, validation_inference_steps=2)
    train(config)
    losses = json.loads((tmp_path / "out/validation/step-000004/held_out.json").read_text())
    assert np.isfinite(losses["held_out_loss"]).all()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved[DATA_KEY]["t5"] is False
    pictures = {}
    for name, changes in {
        "base": {},
        "option": {"pretrained_model_name_or_path": str(without_t5), "t5": False},
        "cache": {"cache": str(cached), "conditioning_name": "conditioning"},
    }.items():
        drawing = GenerateConfig(
            **{
                "controlnet": (str(tmp_path / "out"),),
                "pretrained_model_name_or_path": str(without_t5),
                "prompt": (PROMPTS[0],),
                "image": (circles / "source" / "0.png",),
                "output_dir": tmp_path / name,
                "num_inference_steps": 2,
                "device": "cpu",
                **changes,
            }
        )
        generate(drawing)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "000.png"))
    assert np.array_equal(pictures["base"], pictures["option"])
    assert np.array_equal(pictures["base"], pictures["cache"])


def test_no_t5_draws_what_the_stock_pipeline_draws_without_it(
    base: Path, controlnet: Path, cache: Path, circles: Path, tmp_path: Path
) -> None:
    config = GenerateConfig(
        controlnet=(str(controlnet),),
        pretrained_model_name_or_path=str(base),
        prompt=(PROMPTS[0],),
        image=(circles / "source" / "0.png",),
        output_dir=tmp_path / "ours",
        num_inference_steps=2,
        t5=False,
        device="cpu",
    )
    generate(config)
    generate(replace(config, cache=str(cache), output_dir=tmp_path / "cached"))
    generate(replace(config, t5=True, output_dir=tmp_path / "with"))
    drawn = {
        name: np.asarray(Image.open(tmp_path / name / "000.png"))
        for name in ("ours", "cached", "with")
    }
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base,
        controlnet=SD3ControlNetModel.from_pretrained(controlnet),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    side = drawn["ours"].shape[0]
    with Image.open(circles / "source" / "0.png") as image:
        conditioning = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    stock = pipeline(
        PROMPTS[0],
        control_image=conditioning,
        width=side,
        height=side,
        num_inference_steps=2,
        guidance_scale=7.0,
        max_sequence_length=TOKENS,
        generator=torch.manual_seed(0),
    ).images[0]
    assert np.array_equal(drawn["ours"], np.asarray(stock))
    assert np.abs(drawn["ours"].astype(int) - drawn["cached"]).max() <= 1
    assert not np.array_equal(drawn["ours"], drawn["with"])


def test_what_changes_for_a_controlnet_is_said(
    cached: Path,
    cache: Path,
    base: Path,
    controlnet: Path,
    circles: Path,
    tmp_path: Path,
    command: Callable[..., Outcome],
) -> None:
    run = four_steps(base, cached, tmp_path / "without")
    with pytest.raises(ConfigError, match=r"--dropout-t5 0\.5: the cache was made without T5"):
        train(replace(run, dropout_t5=0.5))
    train(replace(run, max_train_steps=1))
    further = replace(
        run, max_train_steps=1, num_controlnet_layers=None, output_dir=tmp_path / "further"
    )
    for start, goes_on, line in (
        (tmp_path / "without", cache, "was trained without T5, and the cache's prompts have T5's"),
        (controlnet, cached, "was trained with T5, and the cache has none of it"),
    ):
        going_on = replace(further, cache=(str(goes_on),), controlnet_model_name_or_path=str(start))
        going_on = replace(going_on, output_dir=tmp_path / f"on-{goes_on.parent.name}")
        assert line in command("train", *flags(going_on)).output
    picture = ("--prompt", PROMPTS[0], "--image", circles / "source" / "0.png")
    common = ("--pretrained-model-name-or-path", base, *picture, "--num-inference-steps", 1)
    for start, option, line in (
        (tmp_path / "without", (), "trained without T5; --no-t5 draws so"),
        (controlnet, ("--no-t5",), "trained with T5, and these prompts are encoded without it"),
    ):
        drawn = command(
            "infer", "generate", *common, "--controlnet", start, *option,
            "--output-dir", tmp_path / f"drawn-{len(option)}",
        )  # fmt: skip
        assert line in drawn.output


def test_a_folder_that_lacks_t5s_files_is_damaged_and_says_the_way_out(
    base: Path, tmp_path: Path, fresh: PrecomputeConfig, command: Callable[..., Outcome]
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    shutil.rmtree(copy / "text_encoder_3")
    assert lists_t5(str(copy))
    config = replace(fresh, pretrained_model_name_or_path=str(copy))
    with pytest.raises(ConfigError, match=r"no text_encoder_3/ in it.* without T5 too: --no-t5"):
        precompute(config)
    outcome = command("precompute", *flags(config), "--no-t5")
    assert outcome.exit_code == 0, outcome.output
    (copy / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match=r"model_index\.json: cannot be read"):
        precompute(config)


def test_weights_of_a_run_on_dropped_t5_are_those_of_a_cache_without(
    cached: Path, precompute_config: PrecomputeConfig, base: Path, tmp_path: Path
) -> None:
    """Dropping T5 always, and having none, is the same to the networks."""
    precompute(replace(precompute_config, cache=tmp_path / "with", validation_rows=2))
    run = four_steps(base, tmp_path / "with", tmp_path / "dropped")
    train(replace(run, dropout_t5=1.0))
    train(replace(run, cache=(str(cached),), output_dir=tmp_path / "without"))
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("dropped", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
