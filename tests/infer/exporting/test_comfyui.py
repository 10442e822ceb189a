"""An exported file computes in ComfyUI what the ControlNet computes in diffusers."""

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from diffusers.models.attention import JointTransformerBlock
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, linear, silu

from common.errors import ConfigError
from infer.config import ExportConfig
from infer.exporting.export import export
from sd3.pretrained import DATA_KEY
from tests.conftest import Outcome

# The VAE's, of ComfyUI's latent format of SD3; it leaves the shift out for ControlNets.
SCALE, SHIFT = 1.5305, 0.0609
GRID, TOKENS, WIDTH_OF_TEXT, POOLED = (6, 4), 5, 32, 16


def made(heads: int, num_layers: int, **settings: Any) -> SD3ControlNetModel:
    """A ControlNet of SD3's structure with random weights, of which none is zero."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 16,
        "num_layers": num_layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": WIDTH_OF_TEXT,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 12,
        "force_zeros_for_pooled_projection": True,
    }
    controlnet = SD3ControlNetModel(**(config | settings))
    with torch.no_grad():
        for layer in (*controlnet.controlnet_blocks, controlnet.pos_embed_input.proj):
            layer.weight.normal_(std=0.02)
            layer.bias.normal_(std=0.02)
    return controlnet


def inputs(inpainting: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "noisy": normal(2, 16, *GRID),
        "latent": normal(2, 16, *GRID),  # of the control, as the VAE gives it
        "mask": (normal(2, 1, *GRID) > 0).double() if inpainting else torch.empty(2, 0, *GRID),
        "timestep": torch.tensor([900.0, 133.25]),
        "text": normal(2, TOKENS, WIDTH_OF_TEXT),
        "pooled": normal(2, POOLED),
    }


@torch.no_grad()
def in_diffusers(controlnet: SD3ControlNetModel, given: dict[str, Tensor]) -> list[Tensor]:
    """What each block of the base gets, but the last, as the stock pipelines drive it."""
    shift = SHIFT if given["mask"].shape[1] else 0.0  # that for inpainting has it
    control = torch.cat([(given["latent"] - shift) * SCALE, given["mask"]], dim=1)
    residuals = controlnet(
        hidden_states=given["noisy"],
        controlnet_cond=control,
        encoder_hidden_states=given["text"],
        pooled_projections=torch.zeros_like(given["pooled"]),
        timestep=given["timestep"],
        return_dict=False,
    )[0]
    depth = controlnet.config.num_attention_heads
    return [residuals[int(block / (depth / len(residuals)))] for block in range(depth - 1)]


@torch.no_grad()
def in_comfyui(path: Path, given: dict[str, Tensor]) -> list[Tensor]:
    """The same by the file alone, in ComfyUI's convention."""
    weights = {name: tensor.double() for name, tensor in load_file(path).items()}

    def layer(name: str, value: Tensor) -> Tensor:
        return linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def mlp(name: str, value: Tensor) -> Tensor:
        return layer(f"{name}.linear_2", silu(layer(f"{name}.linear_1", value)))

    def patches(name: str, value: Tensor) -> Tensor:
        embedded = conv2d(value, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)
        return embedded.flatten(2).transpose(1, 2)

    width = weights["pos_embed_input.proj.weight"].shape[0]
    depth = width // 64
    count = len({name.split(".")[1] for name in weights if name.startswith("transformer_blocks.")})
    side = math.isqrt(weights["pos_embed.pos_embed"].shape[1])
    rows, columns = GRID[0] // 2, GRID[1] // 2
    top, left = (side - rows) // 2, (side - columns) // 2
    positions = weights["pos_embed.pos_embed"].reshape(side, side, width)
    positions = positions[top : top + rows, left : left + columns].reshape(1, -1, width)
    hint = torch.cat([given["latent"] * SCALE, given["mask"]], dim=1)
    x = patches("pos_embed.proj", given["noisy"]) + positions
    x = x + patches("pos_embed_input.proj", hint)
    # diffusers computes these in float32.
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = given["timestep"][:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).double()
    embedding = mlp("time_text_embed.timestep_embedder", waves)
    embedding = embedding + mlp("time_text_embed.text_embedder", torch.zeros(2, POOLED).double())
    context = layer("context_embedder", given["text"])
    spread: list[Tensor] = []
    for number in range(count):
        prefix = f"transformer_blocks.{number}."
        own = {
            key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)
        }
        block = JointTransformerBlock(
            width,
            depth,
            64,
            qk_norm="rms_norm" if "attn.norm_q.weight" in own else None,
            use_dual_attention="attn2.to_q.weight" in own,
        )
        block.double().load_state_dict(own)
        context, x = block(x, context, embedding)
        times = depth // count - (number == count - 1)
        spread += [layer(f"controlnet_blocks.{number}", x)] * times
    return spread


KINDS = {
    "SD3-medium": {},
    "SD3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "SD3.5-large": {"qk_norm": "rms_norm"},
    "inpainting": {"extra_conditioning_channels": 1},
}


def compare(controlnet: SD3ControlNetModel, folder: Path) -> None:
    controlnet.save_pretrained(folder / "controlnet")
    file = folder / "models" / "one.safetensors"
    export(ExportConfig(controlnet=str(folder / "controlnet"), output=file, dtype="float32"))
    given = inputs(bool(controlnet.config.extra_conditioning_channels))
    theirs, ours = in_comfyui(file, given), in_diffusers(controlnet.double(), given)
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, ours, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_residuals_are_diffusers(kind: str, num_layers: int, tmp_path: Path) -> None:
    compare(made(4, num_layers, **KINDS[kind]), tmp_path)


@pytest.mark.slow  # a gigabyte of weights
@pytest.mark.parametrize(
    ("kind", "heads"), [("SD3-medium", 24), ("SD3.5-medium", 24), ("SD3.5-large", 38)]
)
def test_the_residuals_at_true_width(kind: str, heads: int, tmp_path: Path) -> None:
    compare(made(heads, 1, **KINDS[kind]), tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"force_zeros_for_pooled_projection": False}, "--pooled-projection zeros"),
        ({"num_layers": 3}, "3 ControlNet blocks do not divide the base's 4"),
        ({"extra_conditioning_channels": 2}, "one channel beside the latent's at most"),
        ({"attention_head_dim": 32}, "heads are 32 wide"),
        ({DATA_KEY: {"conditioning_range": "0_1"}}, "controls were 0_1 before the VAE"),
        ({"joint_attention_dim": None, "use_pos_embed": False}, "Stability's kind"),
    ],
)
def test_what_comfyui_drives_otherwise_is_refused(
    settings: dict[str, Any],
    words: str,
    command: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    made(4, 2).save_pretrained(tmp_path / "controlnet")
    path = tmp_path / "controlnet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    file = tmp_path / "one.safetensors"
    arguments = ["infer", "export", "--controlnet", str(tmp_path / "controlnet")]
    done = command(*arguments, "--output", str(file))
    assert done.exit_code == 2
    assert words in done.output
    assert "ComfyUI would drive it wrongly" in done.output
    assert not file.exists()


def test_a_controlnet_of_the_script_is_known_by_the_option(
    command: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Its configuration says zeros, and it was trained with the prompt's."""
    made(4, 2).save_pretrained(tmp_path / "controlnet")
    arguments = ["infer", "export", "--controlnet", str(tmp_path / "controlnet")]
    arguments += ["--output", str(tmp_path / "one.safetensors")]
    done = command(*arguments, "--convention", "train_controlnet_sd3")
    assert done.exit_code == 2
    assert "--pooled-projection zeros" in done.output
    assert command(*arguments).exit_code == 0


@pytest.mark.parametrize(
    ("dtype", "of_matrix", "of_bias"),
    [
        ("float16", "F16", "F16"),
        ("bfloat16", "BF16", "BF16"),
        ("float32", "F32", "F32"),
        ("float8_e4m3fn", "F8_E4M3", "F16"),
    ],
)
def test_formats_and_what_a_file_says_of_itself(
    dtype: Any, of_matrix: str, of_bias: str, tmp_path: Path
) -> None:
    controlnet = made(4, 2)
    controlnet.register_to_config(**{DATA_KEY: {"width": 96, "height": 64}})
    controlnet.save_pretrained(tmp_path / "controlnet")
    file = tmp_path / "circles.safetensors"
    export(ExportConfig(controlnet=str(tmp_path / "controlnet"), output=file, dtype=dtype))
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
        names = set(opened.keys())
        for name, kind in (
            ("transformer_blocks.0.attn.to_q.weight", of_matrix),
            ("controlnet_blocks.1.weight", of_matrix),
            ("transformer_blocks.0.attn.to_q.bias", of_bias),
            ("pos_embed_input.proj.weight", of_bias),
        ):
            assert opened.get_slice(name).get_dtype() == kind, name
    assert names == set(controlnet.state_dict())
    assert about["modelspec.title"] == "circles"
    assert about["modelspec.resolution"] == "96x64"
    assert about["modelspec.architecture"].endswith("/controlnet")
    assert json.loads(about["controlnet_config"])["num_layers"] == 2


def test_a_file_is_replaced_only_when_asked(
    command: Callable[..., Outcome], tmp_path: Path
) -> None:
    made(4, 2).save_pretrained(tmp_path / "controlnet")
    file = tmp_path / "one.safetensors"
    arguments = ["infer", "export", "--controlnet", str(tmp_path / "controlnet")]
    arguments += ["--output", str(file)]
    mask = os.umask(0o027)
    try:
        assert command(*arguments).exit_code == 0
    finally:
        os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    before = file.read_bytes()
    done = command(*arguments, "--dtype", "float32")
    assert (done.exit_code, file.read_bytes()) == (2, before)
    assert "is there already; --overwrite replaces it" in done.output
    assert command(*arguments, "--dtype", "float32", "--overwrite").exit_code == 0
    assert file.stat().st_size > len(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["controlnet", "one.safetensors"]
    done = command(*arguments[:-1], str(tmp_path / "one.bin"))
    assert "give a name that ends with .safetensors" in done.output
    done = command(
        "infer", "export", "--controlnet", str(tmp_path / "no"), *arguments[-2:-1], "a.safetensors"
    )
    assert done.exit_code == 2
    assert "no such folder" in done.output


def test_a_weight_that_does_not_fit_is_told(tmp_path: Path) -> None:
    controlnet = made(4, 2)
    with torch.no_grad():
        controlnet.context_embedder.bias[3] = 1e5
    controlnet.save_pretrained(tmp_path / "controlnet")
    config = ExportConfig(
        controlnet=str(tmp_path / "controlnet"), output=tmp_path / "a.safetensors"
    )
    with pytest.raises(ConfigError, match=r"context_embedder\.bias does not fit; try bfloat16"):
        export(config)
    assert not config.output.exists()
