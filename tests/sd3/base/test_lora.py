"""LoRAs merged into a base: as diffusers merges them, and as the formula says."""

import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.errors import ConfigError
from infer.config import GenerateConfig
from infer.drawing.generate import generate
from infer.drawing.metadata import settings_from
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.base.lora import find_loras, merge_loras
from sd3.base.lora_names import in_diffusers_names
from sd3.images import fit
from shards.format import manifest
from shards.reading.cache import Cache
from tests.conftest import PROMPTS, RESOLUTION_PX, TOKENS, flags, four_steps
from tests.published_names import transformer
from train import models
from train.config import TrainConfig
from train.run import train
from train.saving.card_base import card_base
from train.saving.card_example import example

SCALE, RANK, ALPHA = 0.7, 3, 5.0
IN_TRANSFORMER = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj")
IN_CLIP = ("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1")
Changes = Mapping[str, tuple[Tensor, Tensor]]  # of a module: down [r, in], up [out, r]


def drawn(model: Any, modules: tuple[str, ...], seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return random changes of some modules, large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in modules:
        rows, columns = model.get_submodule(name).weight.shape
        changes[name] = (
            torch.randn(RANK, columns, generator=generator) / math.sqrt(columns),
            torch.randn(rows, RANK, generator=generator) / 4,
        )
    return changes


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return StableDiffusion3Pipeline.from_pretrained(base)


@pytest.fixture(scope="module")
def changes(pipeline: Any) -> dict[str, Changes]:
    """Of the transformer and both CLIP encoders."""
    return {
        "transformer": drawn(pipeline.transformer, IN_TRANSFORMER),
        "text_encoder": drawn(pipeline.text_encoder, IN_CLIP, 1),
        "text_encoder_2": drawn(pipeline.text_encoder_2, IN_CLIP, 2),
    }


def save_lora(path: Path, changes: Mapping[str, Changes]) -> Path:
    """Save changes under diffusers' names; without more, alpha is the rank."""
    weights = {}
    for component, modules in changes.items():
        for name, (down, up) in modules.items():
            weights[f"{component}.{name}.lora_A.weight"] = down
            weights[f"{component}.{name}.lora_B.weight"] = up
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def lora(changes: dict[str, Changes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("lora") / "style.safetensors", changes)


def merged(model: Any, modules: Changes, factor: float) -> dict[str, Tensor]:
    """Return a model's weights plus factor x up x down."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, (down, up) in modules.items():
        weights[f"{name}.weight"] += factor * up @ down
    return weights


@pytest.fixture(scope="module")
def merged_base(
    base: Path, changes: dict[str, Changes], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The base with the changes in its weights, by the formula."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(base)
    for name, modules in changes.items():
        model = getattr(pipeline, name)
        model.load_state_dict(merged(model, modules, SCALE))
    folder = tmp_path_factory.mktemp("merged") / "base"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.extras
def test_the_transformers_weights_are_those_of_the_formula(
    base: Path, lora: Path, changes: dict[str, Changes]
) -> None:
    exact = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    found = models.load_transformer(base, None, torch.float32, find_loras([str(lora)], [SCALE]))
    expected = merged(exact, changes["transformer"], SCALE)
    assert found.state_dict().keys() == expected.keys()  # nothing of the LoRA is left
    torch.testing.assert_close(found.state_dict(), expected, rtol=1e-6, atol=1e-6)
    assert {type(layer) for layer in found.modules()} == {type(layer) for layer in exact.modules()}


@pytest.mark.extras
def test_generate_draws_what_the_stock_pipeline_draws_with_it(
    base: Path, controlnet: Path, circles: Path, lora: Path, tmp_path: Path
) -> None:
    config = GenerateConfig(
        pretrained_model_name_or_path=str(base),
        controlnet=(str(controlnet),),
        output_dir=tmp_path / "drawn",
        prompt=PROMPTS[:1],
        image=(circles / "source" / "0.png",),
        num_inference_steps=2,
        lora=(str(lora),),
        lora_scale=(SCALE,),
        device="cpu",
    )
    generate(config)
    generate(replace(config, lora=(), lora_scale=(1.0,), output_dir=tmp_path / "without"))
    stock = StableDiffusion3ControlNetPipeline.from_pretrained(
        base, controlnet=SD3ControlNetModel.from_pretrained(controlnet)
    )
    stock.load_lora_weights(str(lora))
    stock.fuse_lora(lora_scale=SCALE)
    stock.unload_lora_weights()
    expected = stock(
        PROMPTS[0],
        control_image=fit(Image.open(config.image[0]).convert("RGB"), RESOLUTION_PX),
        height=RESOLUTION_PX,
        width=RESOLUTION_PX,
        max_sequence_length=TOKENS,
        num_inference_steps=2,
        generator=torch.manual_seed(0),
    ).images[0]
    found = np.array(Image.open(tmp_path / "drawn" / "000.png"))
    assert np.array_equal(found, np.array(expected))
    # Its settings are in the picture; a folder is looked into.
    generate(replace(config, lora=(str(lora.parent),), output_dir=tmp_path / "of the folder"))
    assert settings_from(tmp_path / "of the folder" / "000.png")[1] == []
    settings, warnings = settings_from(tmp_path / "drawn" / "000.png")
    assert (settings["lora"], settings["lora_scale"], warnings) == ([str(lora)], [SCALE], [])
    assert not {"lora", "lora_scale", "transformer", "single_file_config"} & (
        settings_from(tmp_path / "without" / "000.png")[0].keys()
    )
    assert not np.array_equal(found, np.array(Image.open(tmp_path / "without" / "000.png")))


@pytest.mark.extras
def test_training_computes_with_the_merged_transformer(
    train_config: TrainConfig,
    merged_base: Path,
    controlnet: Path,
    lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(train_config, controlnet_model_name_or_path=str(controlnet))
    config = replace(config, num_controlnet_layers=None)
    trained = {}
    for name, options in (
        ("lora", {"lora": (str(lora),), "lora_scale": (SCALE,)}),
        ("merged", {"pretrained_model_name_or_path": str(merged_base)}),
        ("without", {}),
    ):
        train(replace(config, output_dir=tmp_path / name, **options))
        (file,) = (tmp_path / name).glob("*.safetensors")
        trained[name] = load_file(file)
    # As a command too, which imports only what it needs.
    of_command = replace(
        config, output_dir=tmp_path / "command", lora=(str(lora),), lora_scale=(SCALE,)
    )
    subprocess.run([sys.executable, "-m", "train", *flags(of_command)], check=True)
    (file,) = (tmp_path / "command").glob("*.safetensors")
    torch.testing.assert_close(load_file(file), trained["lora"], rtol=1e-5, atol=1e-7)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"with `style.safetensors` merged at {SCALE}" in card
    assert str(lora) not in card
    said = "style.safetensors: prompts come from the cache; only precompute --lora merges its part"
    assert said in capsys.readouterr().err
    torch.testing.assert_close(trained["lora"], trained["merged"], rtol=1e-3, atol=2e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained["without"], trained["merged"], rtol=1e-3, atol=2e-5)


@pytest.mark.extras
def test_precompute_encodes_with_the_merged_clip_encoders(
    precompute_config: PrecomputeConfig,
    cache: Path,
    merged_base: Path,
    lora: Path,
    changes: dict[str, Changes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_lora = {"lora": (str(lora),), "lora_scale": (SCALE,)}
    precompute(replace(precompute_config, cache=tmp_path / "lora", **with_lora))
    precompute(
        replace(
            precompute_config,
            cache=tmp_path / "merged",
            pretrained_model_name_or_path=str(merged_base),
        )
    )
    found, expected, without = (
        embeds(folder) for folder in (tmp_path / "lora", tmp_path / "merged", cache)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found["clip_embeds"], without["clip_embeds"], atol=1e-2)
    torch.testing.assert_close(found["t5_embeds"], without["t5_embeds"], rtol=0, atol=0)
    ours, plain = manifest.load(tmp_path / "lora"), manifest.load(cache)
    assert ours.latents.fingerprint == plain.latents.fingerprint
    assert ours.text.fingerprint != plain.text.fingerprint
    assert ours.made_by["loras"] == [f"style.safetensors at {SCALE}"]
    # A run beside the same LoRA has nothing to say of it.
    capsys.readouterr()
    config = four_steps(
        Path(precompute_config.pretrained_model_name_or_path), tmp_path / "lora", tmp_path / "out"
    )
    train(replace(config, max_train_steps=1, **with_lora))
    assert "prompts come from the cache" not in capsys.readouterr().err
    # Of the transformer alone: the same cache as without it.
    capsys.readouterr()
    other = save_lora(tmp_path / "other.safetensors", {"transformer": changes["transformer"]})
    again = tmp_path / "again"
    precompute(replace(precompute_config, cache=again, lora=(str(other),)))
    assert "changes the transformer alone; the cache is as without it" in capsys.readouterr().err
    assert manifest.load(again).text.fingerprint == plain.text.fingerprint


def embeds(cache: Path) -> dict[str, Tensor]:
    return Cache(cache).text.tensors(0, 0)


def kohya(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return a random LoRA of all matrices of a published transformer, as kohya's scripts save."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in weights.items():
        if name.endswith(".weight") and tensor.dim() == 2:
            module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            found[f"{module}.lora_down.weight"] = torch.randn(
                RANK, tensor.shape[1], generator=generator
            )
            found[f"{module}.lora_up.weight"] = torch.randn(
                tensor.shape[0], RANK, generator=generator
            )
            found[f"{module}.alpha"] = torch.tensor(ALPHA)
    return found


@pytest.mark.extras
@pytest.mark.parametrize("dual", [(), (0, 1)])
def test_kohyas_names_change_what_they_name_in_the_published_model(
    dual: tuple[int, ...], tmp_path: Path
) -> None:
    """The change is made under the published names; both then are brought under diffusers'."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    published = transformer(model.state_dict())
    lora = kohya(published, seed=1)
    save_file(lora, tmp_path / "kohya.safetensors")
    for name in list(published):
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{module}.alpha" in lora:
            up, down = lora[f"{module}.lora_up.weight"], lora[f"{module}.lora_down.weight"]
            published[name] = published[name] + SCALE * ALPHA / RANK * up @ down
    (found,) = find_loras([str(tmp_path / "kohya.safetensors")], [SCALE])
    merge_loras(model, "transformer", [found])
    torch.testing.assert_close(transformer(model.state_dict()), published, rtol=1e-5, atol=1e-5)


@pytest.mark.extras
def test_the_cards_snippet_merges_what_diffusers_reads(
    train_config: TrainConfig, lora: Path, pipeline: Any, tmp_path: Path
) -> None:
    """diffusers merges nothing of kohya's names for SD3, and only warns."""
    save_file(kohya(transformer(pipeline.transformer.state_dict()), 1), tmp_path / "k.safetensors")
    files = (str(lora), str(tmp_path / "k.safetensors"))
    card = card_base(replace(train_config, lora=files, lora_scale=(0.5, 2.0)))
    text = example(
        "me/it", card, {"height": 8, "width": 8, "max_sequence_length": 9}, inpainting=False
    )
    assert card.in_words.endswith(
        "with `style.safetensors` merged at 0.5 and `k.safetensors` merged at 2"
    )
    assert (
        'load_lora_weights("path/to/style.safetensors")\npipeline.fuse_lora(lora_scale=0.5)' in text
    )
    assert "# Without k.safetensors at 2: diffusers does not read its names" in text
    assert text.count("pipeline.load_lora_weights") == 1


@pytest.mark.extras
def test_alphas_of_diffusers_names_scale_as_kohyas_do(
    base: Path, pipeline: Any, tmp_path: Path
) -> None:
    changes = drawn(pipeline.transformer, IN_TRANSFORMER, seed=5)
    file = save_lora(tmp_path / "a.safetensors", {"transformer": changes})
    alphas = {f"transformer.{name}.alpha": torch.tensor(ALPHA) for name in changes}
    save_file(load_file(file) | alphas, file)
    found = models.load_transformer(base, None, torch.float32, find_loras([str(file)], [SCALE]))
    expected = merged(pipeline.transformer, changes, SCALE * ALPHA / RANK)
    torch.testing.assert_close(found.state_dict(), expected, rtol=1e-6, atol=1e-6)


def test_kohyas_text_encoders_and_dotted_names() -> None:
    pair = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2)}
    first, second = "lora_te1_text_model_encoder_layers", "lora_te2_text_model_encoder_layers"
    names = in_diffusers_names(
        {f"{first}_11_self_attn_out_proj.{n}": t for n, t in pair.items()}
        | {f"{second}_3_mlp_fc2.{n}": t for n, t in pair.items()}
        | {"diffusion_model.joint_blocks.7.x_block.attn.proj.lora_A.weight": torch.ones(2, 4)}
        | {"diffusion_model.joint_blocks.7.x_block.attn.proj.lora_B.weight": torch.ones(4, 2)},
        Path("x"),
    )
    assert {name for name in names if "lora_A" in name} == {
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.3.mlp.fc2.lora_A.weight",
        "transformer.transformer_blocks.7.attn.to_out.0.lora_A.weight",
    }


@pytest.mark.extras
def test_several_are_merged_each_at_its_scale(base: Path, tmp_path: Path, pipeline: Any) -> None:
    first, second = (drawn(pipeline.transformer, IN_TRANSFORMER, seed) for seed in (3, 4))
    paths = [
        str(save_lora(tmp_path / f"{number}.safetensors", {"transformer": each}))
        for number, each in enumerate((first, second))
    ]
    exact = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    exact.load_state_dict(merged(exact, first, 0.5))
    expected = merged(exact, second, -1.0)
    found = models.load_transformer(base, None, torch.float32, find_loras(paths, [0.5, -1.0]))
    torch.testing.assert_close(found.state_dict(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ConfigError, match="--lora-scale: 3 for 2 --lora; give one, or one for"):
        find_loras(paths, [1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match=r"--lora-scale 0\.5: there is no --lora\."):
        find_loras([], [0.5])


@pytest.mark.extras
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["transformer.a.lora_A.weight", "transformer.a.dora_scale"], "a DoRA, not a plain LoRA"),
        (["lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a"], "a LoHa, not a plain LoRA"),
        (["unet.down_blocks.0.lora_A.weight"], "no LoRA of SD3: .* found unet"),
        (["transformer.pos_embed.proj.weight"], "no LoRA of SD3"),
        (
            ["lora_unet_input_blocks_1_1_proj_in.alpha"],
            "lora_unet_input_blocks_1_1_proj_in has no pair of down and up",
        ),
        (["lora_te3_encoder_block_0.lora_down.weight"], "has no pair of down and up"),
    ],
)
def test_what_is_no_lora_of_sd3_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, file)
    with pytest.raises(ConfigError, match=rf"^--lora {file}: .*{message}"):
        find_loras([str(file)], [1.0])


@pytest.mark.extras
def test_one_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    for name, shape, message in (
        (
            "transformer_blocks.23.attn.to_q",
            (4, 4),
            "this transformer has no transformer_blocks.23",
        ),
        (
            "transformer_blocks.0.attn.to_q",
            (5, 7),
            "does not fit this transformer: .*size mismatch",
        ),
    ):
        changes = {name: (torch.ones(2, shape[1]), torch.ones(shape[0], 2))}
        file = save_lora(tmp_path / "x.safetensors", {"transformer": changes})
        with pytest.raises(ConfigError, match=rf"^--lora {file}: .*{message}"):
            models.load_transformer(base, None, torch.float32, find_loras([str(file)], [1.0]))


@pytest.mark.extras
def test_a_folder_and_its_usual_file(tmp_path: Path, changes: dict[str, Changes]) -> None:
    with pytest.raises(ConfigError, match="--lora nowhere: no such file or folder"):
        find_loras(["nowhere"], [1.0])
    save_lora(tmp_path / "a.safetensors", changes)
    assert find_loras([str(tmp_path)], [1.0])[0].path == tmp_path / "a.safetensors"
    save_lora(tmp_path / "b.safetensors", changes)
    with pytest.raises(ConfigError, match=r"found a\.safetensors, b\.safetensors\. Give the file"):
        find_loras([str(tmp_path)], [1.0])
    save_lora(tmp_path / "pytorch_lora_weights.safetensors", changes)
    (found,) = find_loras([str(tmp_path)], [1.0])
    assert found.path.name == "pytorch_lora_weights.safetensors"
    assert found.components == {"transformer", "text_encoder", "text_encoder_2"}


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"--lora: peft is not installed: pip install '\.\[lora\]'"
    ):
        find_loras(["x"], [1.0])
