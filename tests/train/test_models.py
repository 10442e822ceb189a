"""The ControlNet: grown without side effects, saved as the stock pipeline reads it."""

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3ControlNetModel

from common.errors import ConfigError
from sd3.controlnet.pooled_projection import PooledProjection
from sd3.pretrained import DATA_KEY
from sd3.prompt_embeds import prompt_embeds
from shards.format import manifest
from shards.reading.cache import Cache
from train import models
from train.compatibility import check_base
from train.continued.find import check_controlnet
from train.sets.data_entry import data_entry


def test_a_new_controlnet_copies_the_first_blocks(base: Path) -> None:
    transformer = models.load_transformer(base, None, torch.float32)
    numbers = torch.get_rng_state()
    controlnet = models.new_controlnet(base, None, 2)
    assert torch.equal(torch.get_rng_state(), numbers)  # no weight was drawn to be overwritten
    assert all(parameter.requires_grad for parameter in controlnet.parameters())
    assert controlnet.config.num_layers == 2
    assert controlnet.config.extra_conditioning_channels == 0
    ours, theirs = controlnet.state_dict(), transformer.state_dict()
    shared = [name for name in ours if name in theirs]
    assert any("transformer_blocks.1." in name for name in shared)
    for name in shared:
        assert torch.equal(ours[name], theirs[name]), name
    rest = [name for name in ours if name not in theirs]
    assert {name.split(".")[0] for name in rest} == {"controlnet_blocks", "pos_embed_input"}
    assert not any(ours[name].any() for name in rest)


@pytest.mark.parametrize(("convention", "entry"), [("prompt", False), ("zeros", True)])
def test_a_new_controlnet_says_its_convention(
    base: Path, convention: PooledProjection, entry: bool
) -> None:
    controlnet = models.new_controlnet(base, None, 1, convention)
    assert controlnet.config.force_zeros_for_pooled_projection is entry


def test_the_number_of_blocks_is_bounded_by_the_base(base: Path) -> None:
    assert models.new_controlnet(base, None, None).config.num_layers == 2
    assert models.new_controlnet(base, None, 1).config.num_layers == 1
    for wrong in (0, 3):
        with pytest.raises(
            ConfigError,
            match=f"{wrong}: a base model of 4 blocks supports 1 to 2 ControlNet blocks",
        ):
            models.new_controlnet(base, None, wrong)


def test_every_block_of_the_largest_controlnet_has_an_effect(base: Path) -> None:
    transformer = models.load_transformer(base, None, torch.float32)
    hidden = torch.randn(1, 16, 8, 8)
    common = {
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 96),
        "pooled_projections": torch.randn(1, 80),
    }

    def has_gradient(count: int) -> list[bool]:
        residuals = [torch.zeros(1, 16, 64, requires_grad=True) for _ in range(count)]
        transformer(
            hidden_states=hidden, block_controlnet_hidden_states=residuals, **common
        ).sample.sum().backward()
        return [residual.grad is not None for residual in residuals]

    assert has_gradient(2) == [True, True]
    assert has_gradient(3) == [True, True, False]  # why half the base's blocks are the bound


def test_weights_are_copied_as_stored_whatever_the_base_runs_in(base: Path, tmp_path: Path) -> None:
    transformer = models.load_transformer(base, None, torch.float16)
    transformer.save_pretrained(tmp_path / "transformer", max_shard_size="500KB")
    files = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    controlnet = models.new_controlnet(tmp_path, None, 2)
    assert controlnet.dtype == torch.float32
    stored, ours = transformer.state_dict(), controlnet.state_dict()
    copied = [name for name in ours if not name.startswith(("controlnet_blocks.", "pos_embed_in"))]
    # All but the weight and the bias of each of two blocks' ends, and of the control's start.
    assert len(copied) == len(ours) - 2 * 2 - 2
    for name in copied:
        assert torch.equal(ours[name], stored[name].float()), name
    files[0].unlink()
    with pytest.raises(ConfigError, match="weights are missing"):
        models.new_controlnet(tmp_path, None, 2)


def test_exactly_what_gets_no_gradient_is_frozen(base: Path, cache: Path) -> None:
    controlnet = models.new_controlnet(base, None, 2)
    embeds = Cache(cache).empty_prompt()
    hidden = torch.randn(1, 16, 8, 8)
    for block in controlnet.controlnet_blocks:
        torch.nn.init.ones_(block.weight)
    residuals = controlnet(
        hidden_states=hidden,
        controlnet_cond=hidden,
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=prompt_embeds(embeds["clip_embeds"][None], embeds["t5_embeds"][None]),
        pooled_projections=embeds["pooled_embeds"][None],
    )[0]
    sum(residual.sum() for residual in residuals).backward()
    without = {name for name, one in controlnet.named_parameters() if one.grad is None}
    models.freeze_unused(controlnet)
    frozen = {name for name, one in controlnet.named_parameters() if not one.requires_grad}
    assert frozen == without
    assert frozen


def test_stock_diffusers_loads_the_saved_controlnet_without_a_warning(
    base: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controlnet = models.new_controlnet(base, None, 2)
    found = Cache(cache)
    data = data_entry(found.manifest, "conditioning")
    controlnet.register_to_config(**{DATA_KEY: data})
    controlnet.save_pretrained(tmp_path)
    diffusers_logger = logging.getLogger("diffusers")
    diffusers_logger.addHandler(caplog.handler)
    try:
        loaded = SD3ControlNetModel.from_pretrained(tmp_path)
    finally:
        diffusers_logger.removeHandler(caplog.handler)
    assert caplog.text == ""
    assert loaded.config[DATA_KEY]["max_sequence_length"] == 20
    assert loaded.config[DATA_KEY]["conditioning_range"] == "-1_1"
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, controlnet.state_dict()[name])


def test_the_saved_controlnet_says_which_shapes_it_was_trained_on(bucketed: Path) -> None:
    found = Cache(bucketed)
    data = data_entry(found.manifest, "conditioning")
    assert (data["height"], data["width"]) == (64, 64)
    assert data["buckets"] == [(64, 64), (32, 96), (96, 32)]
    wide = replace(found.manifest, buckets=[(4, 12), (8, 6), (6, 8)])
    data = data_entry(wide, "conditioning")
    assert (data["height"], data["width"]) == (64, 48)


def test_every_bucket_is_held_against_the_base(base: Path, bucketed: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "transformer", tmp_path / "transformer")
    found = manifest.load(bucketed)
    check_base(tmp_path, found)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pos_embed_max_size": 4}))
    with pytest.raises(ConfigError) as caught:
        check_base(tmp_path, found)
    assert "8 x 8 " not in str(caught.value)
    for grid in ("4 x 12", "12 x 4"):
        assert re.search(rf"pos_embed_max_size\) +{grid} +at most 8", str(caught.value))
    path.write_text(json.dumps(config | {"patch_size": 8}))
    with pytest.raises(ConfigError, match=r"patch_size\) +4 x 12 +multiples of 8"):
        check_base(tmp_path, found)


@pytest.mark.parametrize(
    ("component", "edit", "message"),
    [
        ("transformer", {"joint_attention_dim": 4096}, r"\(joint_attention_dim\) +96 +4096"),
        ("transformer", {"joint_attention_dim": 64}, r"CLIP width .* 80 +at most 64"),
        ("transformer", {"pooled_projection_dim": 2048}, r"pooled width .* 80 +2048"),
        ("transformer", {"in_channels": 4}, "latent channels +16 +4"),
        ("transformer", {"pos_embed_max_size": 2}, r"pos_embed_max_size\) +8 x 8 +at most 4"),
        ("transformer", {"patch_size": 3}, r"patch_size\) +8 x 8 +multiples of 3"),
        ("transformer", {"patch_size": None}, "not an SD3 transformer"),
        ("vae", {"scaling_factor": 0.18215}, r"VAE scale .* 1\.5305 +0\.18215"),
        ("vae", {"shift_factor": None}, r"VAE shift .* 0\.0609 +0\.0"),
        ("vae", {"latent_channels": 4}, r"VAE channels .* 16 +4"),
    ],
)
def test_a_cache_that_does_not_fit_the_base_is_refused(
    base: Path,
    cache: Path,
    tmp_path: Path,
    component: str,
    edit: dict[str, object],
    message: str,
) -> None:
    for name in ("transformer", "vae"):
        shutil.copytree(base / name, tmp_path / name)
    check_base(tmp_path, manifest.load(cache))
    path = tmp_path / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(ConfigError, match=message) as caught:
        check_base(tmp_path, manifest.load(cache))
    if edit.get("patch_size", "") is not None:
        assert re.search(r"\n +cache +model\n", str(caught.value))


def test_a_controlnet_of_other_widths_is_refused(base: Path, cache: Path) -> None:
    controlnet = models.new_controlnet(base, None, 2)
    made = manifest.load(cache)
    check_controlnet(controlnet, base, made, 0)
    for wrong, message in (
        ({"joint_attention_dim": 4096}, "joint_attention_dim: ControlNet 4096, base model 96"),
        ({"joint_attention_dim": None}, "joint_attention_dim: ControlNet None, training needs 96"),
        ({"extra_conditioning_channels": 1}, "extra_conditioning_channels: ControlNet 1"),
        ({"num_layers": 3}, "num_layers: ControlNet 3, base 4"),
        ({"pos_embed_max_size": 2}, "positions a side: ControlNet 4, cache 8"),
    ):
        changed = models.new_controlnet(base, None, 2)
        changed.register_to_config(**wrong)
        with pytest.raises(ConfigError, match=message):
            check_controlnet(changed, base, made, 0)
