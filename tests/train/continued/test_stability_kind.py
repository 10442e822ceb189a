"""ControlNets like Stability's for SD3.5-large: blocks of the picture alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from PIL import Image

import demo.base_model.pipeline
from benchmarks.reference.runs import logged_losses
from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.controlnet.pooled_projection import FORCE_ZEROS, PooledProjection
from sd3.pretrained import read_config
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, awaken
from tests.train.test_processes import train_sharded
from tests.train.test_run import WEIGHTS, near_gradient_descent, same, weights
from train import models
from train.config import TrainConfig
from train.memory.estimate import find_sizes
from train.memory.simulation import simulate
from train.run import train


@pytest.fixture
def stability(controlnet: Path, tmp_path: Path) -> Path:
    """One with a say, with the entries that theirs have."""
    values = json.loads((controlnet / "config.json").read_text())
    entries = {name: value for name, value in values.items() if not name.startswith("_")} | {
        "joint_attention_dim": None,
        "use_pos_embed": False,
        "pos_embed_max_size": None,
        "pos_embed_type": None,
        "dual_attention_layers": (),
        FORCE_ZEROS: False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SD3ControlNetModel.from_config(entries)
        awaken(network)
    network.save_pretrained(tmp_path / "stability")
    return tmp_path / "stability"


@pytest.fixture
def config(train_config: TrainConfig, stability: Path) -> TrainConfig:
    """Three steps from it, with pictures at the end."""
    return replace(
        train_config,
        controlnet_model_name_or_path=str(stability),
        num_controlnet_layers=None,
        max_train_steps=3,
        learning_rate=1e-2,
        validation_steps=3,
        num_validation_images=1,
        validation_inference_steps=2,
        validation_guidance_scale=3.0,
    )


def test_a_learning_rate_of_0_changes_nothing(config: TrainConfig, stability: Path) -> None:
    train(replace(config, learning_rate=0.0, validation_steps=0))
    assert same(stability, config.output_dir)


@pytest.mark.parametrize("convention", ["prompt", "zeros"])
def test_it_is_trained_and_draws_what_the_stock_pipeline_draws(
    config: TrainConfig,
    stability: Path,
    base: Path,
    circles: Path,
    convention: PooledProjection,
) -> None:
    path = stability / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {FORCE_ZEROS: convention == "zeros"}))
    train(config)
    before, after = weights(stability), weights(config.output_dir)
    assert before.keys() == after.keys()
    still = [name for name in before if before[name].equal(after[name])]
    # Zeros have no gradient, and no weight decay within three steps changes a bias of zeros.
    assert not [name for name in still if before[name].any()]
    saved = SD3ControlNetModel.from_pretrained(config.output_dir)
    assert (saved.config.use_pos_embed, saved.config.joint_attention_dim) == (False, None)
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(base, controlnet=saved)
    for number, prompt in enumerate(PROMPTS):
        image = Image.open(circles / "source" / f"{number}.png").convert("RGB")
        image = image.resize((RESOLUTION_PX, RESOLUTION_PX), Image.Resampling.BILINEAR)
        generator = torch.Generator().manual_seed(config.seed + number)
        (stock,) = pipeline(
            prompt,
            control_image=image,
            height=RESOLUTION_PX,
            width=RESOLUTION_PX,
            num_inference_steps=2,
            guidance_scale=3.0,
            latents=torch.randn(1, 16, 8, 8, generator=generator),
            max_sequence_length=TOKENS,
            output_type="np",
        ).images
        drawn = Image.open(config.output_dir / f"validation/step-000003/{number}.png")
        found = np.split(np.asarray(drawn) / 255, 2, axis=1)[1]
        assert np.abs(found - stock).max() < 2.5 / 255


@pytest.mark.parametrize("checkpointing", ["controlnet", "selective", "full"])
def test_recomputed_activations_change_nothing(
    config: TrainConfig, tmp_path: Path, checkpointing: str
) -> None:
    plain = replace(config, validation_steps=0, max_train_steps=2)
    train(plain)
    other = replace(plain, checkpointing=checkpointing, output_dir=tmp_path / "other")
    train(other)
    assert same(plain.output_dir, other.output_dir)


def test_a_run_is_resumed(config: TrainConfig, tmp_path: Path) -> None:
    whole = replace(config, validation_steps=0, lr_scheduler="constant", checkpointing_steps=1)
    train(whole)
    parts = replace(whole, output_dir=tmp_path / "parts", ema_decay=0.5)
    train(replace(parts, max_train_steps=2))
    train(replace(parts, resume_from_checkpoint="latest"))
    assert same(whole.output_dir, parts.output_dir)
    average = SD3ControlNetModel.from_pretrained(parts.output_dir / "controlnet_ema")
    assert average.config.use_pos_embed is False


def test_half_precision(config: TrainConfig) -> None:
    train(replace(config, mixed_precision="bf16", validation_steps=0))
    assert (config.output_dir / WEIGHTS).is_file()


@pytest.mark.slow
def test_it_is_shared_out_block_by_block(config: TrainConfig, tmp_path: Path) -> None:
    one = replace(
        near_gradient_descent(config),
        pooled_projection="zeros",
        lr_scheduler="constant",
        validation_steps=0,
        logging_steps=1,
        report_to="tensorboard",
    )
    train(one)
    two = replace(one, output_dir=tmp_path / "two", train_batch_size=1)
    train_sharded("fsdp2", two)
    losses = logged_losses(one.output_dir)
    assert len(losses) == 3
    assert logged_losses(two.output_dir) == pytest.approx(losses, rel=1e-5)


def test_the_card_says_its_kind(config: TrainConfig) -> None:
    train(replace(config, max_train_steps=1, validation_steps=0))
    card = (config.output_dir / "README.md").read_text()
    assert "It is of Stability's kind" in card
    assert "ComfyUI" not in card


def test_its_memory_is_counted(config: TrainConfig, base: Path) -> None:
    """Without the text's tokens its blocks keep less for the backward pass than joint ones."""
    one = replace(config, validation_steps=0)
    sizes = find_sizes(one)
    joint = replace(sizes, controlnet=models.controlnet_config(base, 2))
    kept, kept_by_joint = (simulate(one, each).step["activations"] for each in (sizes, joint))
    assert 0 < kept < kept_by_joint


BASES: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 4, "qk_norm": None},
    "sd35-medium": {"num_layers": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
}


@pytest.mark.parametrize("name", BASES)
def test_a_new_one_copies_the_pictures_stream(name: str, tmp_path: Path) -> None:
    pipeline = demo.base_model.pipeline.build_pipeline(0, **BASES[name])
    demo.base_model.pipeline.save_base(tmp_path, pipeline)
    ours = models.new_controlnet(tmp_path, None, 2, kind="stability")
    theirs = pipeline.transformer
    assert not any(parameter.any() for parameter in ours.controlnet_blocks.parameters())
    assert not any(parameter.any() for parameter in ours.pos_embed_input.parameters())
    dim = theirs.inner_dim
    hidden, embedding = torch.randn(2, 5, dim), torch.randn(2, dim)
    for block, joint in zip(ours.transformer_blocks, theirs.transformer_blocks, strict=False):
        for one, other in zip(
            block.norm1(hidden, emb=embedding), joint.norm1(hidden, emb=embedding), strict=False
        ):
            torch.testing.assert_close(one, other)
        assert torch.equal(block.ff(hidden), joint.ff(hidden))
        copied = ["to_v", "to_out.0"] + ([] if BASES[name]["qk_norm"] else ["to_q", "to_k"])
        for part in copied:
            one, other = (each.attn.get_submodule(part) for each in (block, joint))
            assert torch.equal(one(hidden), other(hidden))
        for part in {"to_q", "to_k"} - set(copied):
            one, other = (each.attn.get_submodule(part).weight for each in (block, joint))
            assert not torch.equal(one, other)
            # Uniform up to one over the square root of the width.
            assert 0.9 < one.abs().max() * dim**0.5 <= 1
    embedder = ours.time_text_embed(torch.ones(2), torch.ones(2, 80))
    torch.testing.assert_close(embedder, theirs.time_text_embed(torch.ones(2), torch.ones(2, 80)))


@pytest.mark.parametrize("name", BASES)
def test_a_new_one_is_trained_from_nothing(
    name: str, train_config: TrainConfig, tmp_path: Path
) -> None:
    pipeline = demo.base_model.pipeline.build_pipeline(0, **BASES[name])
    demo.base_model.pipeline.save_base(tmp_path / "base", pipeline)
    config = replace(
        train_config,
        pretrained_model_name_or_path=str(tmp_path / "base"),
        controlnet_kind="stability",
    )
    train(replace(config, max_train_steps=2, lr_scheduler="constant"))
    with pytest.raises(ConfigError, match="joint_attention_dim: checkpoint None, now 96"):
        train(replace(config, controlnet_kind=None, resume_from_checkpoint="latest"))
    whole = replace(config, lr_scheduler="constant", output_dir=tmp_path / "whole")
    train(whole)
    parts = replace(config, lr_scheduler="constant", resume_from_checkpoint="latest")
    train(parts)
    assert same(whole.output_dir, parts.output_dir)
    saved = SD3ControlNetModel.from_pretrained(config.output_dir)
    assert (saved.config.use_pos_embed, saved.config.joint_attention_dim) == (False, None)
    # What starts at zero moves: the ControlNet learns.
    assert all(block.weight.any() for block in saved.controlnet_blocks)


def test_the_kind_is_of_a_new_one(config: TrainConfig, base: Path) -> None:
    train(replace(config, controlnet_kind="stability", max_train_steps=1, validation_steps=0))
    with pytest.raises(
        ConfigError, match=r"--controlnet-kind joint: is for a new ControlNet; .* kind stability"
    ):
        train(replace(config, controlnet_kind="joint"))
    new = replace(
        config, controlnet_model_name_or_path=None, num_controlnet_layers=2, validation_steps=0
    )
    ours = find_sizes(replace(new, controlnet_kind="stability")).controlnet
    assert ours["joint_attention_dim"] is None
    assert find_sizes(new).controlnet["joint_attention_dim"] == 96


def test_it_goes_on_from_their_canny_as_that_was_trained(
    config: TrainConfig, fresh: PrecomputeConfig, base: Path, circles: Path, tmp_path: Path
) -> None:
    canny = replace(config, convention="stability_canny", learning_rate=0.0)
    with pytest.raises(ConfigError, match="trained on conditioning images in stability_canny, and"):
        train(canny)
    precompute(replace(fresh, conditioning_range="stability_canny"))
    train(replace(canny, cache=(str(fresh.cache),)))
    saved = read_config(config.output_dir, "")
    assert saved["_precompute"]["conditioning_range"] == "stability_canny"
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=SD3ControlNetModel.from_pretrained(config.output_dir)
    )
    image = Image.open(circles / "source" / "0.png").convert("RGB")
    image = image.resize((RESOLUTION_PX, RESOLUTION_PX), Image.Resampling.BILINEAR)
    unit = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    drawing = {
        "prompt": PROMPTS[0],
        "control_image": unit * 255 * 0.5 + 0.5,
        "height": RESOLUTION_PX,
        "width": RESOLUTION_PX,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": TOKENS,
        "output_type": "np",
    }
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(config.seed))
    (stock,) = pipeline(latents=noise, **drawing).images
    drawn = Image.open(config.output_dir / "validation/step-000003/0.png")
    found = np.split(np.asarray(drawn) / 255, 2, axis=1)[1]
    assert np.abs(found - stock).max() < 2.5 / 255
    # Theirs is drawn so too, though its configuration does not say it.
    generate(
        GenerateConfig(
            pretrained_model_name_or_path=str(base),
            controlnet=(str(config.controlnet_model_name_or_path),),
            convention="stability_canny",
            output_dir=tmp_path / "drawn",
            prompt=PROMPTS[:1],
            image=(circles / "source" / "0.png",),
            resolution=RESOLUTION_PX,
            max_sequence_length=TOKENS,
            num_inference_steps=2,
            guidance_scale=3.0,
            device="cpu",
        )
    )
    (stock,) = pipeline(generator=torch.manual_seed(0), **drawing).images
    found = np.asarray(Image.open(tmp_path / "drawn" / "000.png")) / 255
    assert np.abs(found - stock).max() < 1.5 / 255
