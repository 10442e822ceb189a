"""LoRAs under the published model's names, as kohya's scripts write them, under diffusers'.

Such a name is `lora_unet_` or `lora_te1_` and a module's name with underscores, as
`lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight`; others write `diffusion_model.` and
the name with dots. One `up` is then for queries, keys and values together, and `alpha` beside it
says by what the product is scaled: alpha / rank.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from common.errors import ConfigError

PREFIXES = ("lora_unet_", "lora_te", "diffusion_model.", "transformer.joint_blocks.")
ENDINGS = {
    ".lora_down.weight": "down",
    ".lora_A.weight": "down",
    ".lora_up.weight": "up",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
}
STREAMS = {
    "x_block": {
        "attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn_proj": ("attn.to_out.0",),
        "attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "attn2_proj": ("attn2.to_out.0",),
        "mlp_fc1": ("ff.net.0.proj",),
        "mlp_fc2": ("ff.net.2",),
        "adaLN_modulation_1": ("norm1.linear",),
    },
    "context_block": {
        "attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn_proj": ("attn.to_add_out",),
        "mlp_fc1": ("ff_context.net.0.proj",),
        "mlp_fc2": ("ff_context.net.2",),
        "adaLN_modulation_1": ("norm1_context.linear",),
    },
}
OUTSIDE = {
    "context_embedder": "context_embedder",
    "x_embedder_proj": "pos_embed.proj",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
ENCODERS = {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
OF_ENCODER = re.compile(
    r"text_model_encoder_layers_(\d+)_(?:(self_attn)_(q_proj|k_proj|v_proj|out_proj)|(mlp)_(fc[12]))"
)


def is_of_published_names(names: Iterable[str]) -> bool:
    """Return whether a LoRA's weights have the published model's names."""
    return any(name.startswith(PREFIXES) for name in names)


def in_diffusers_names(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a LoRA under diffusers' names, `up` scaled by alpha / rank.

    Args:
        weights: `down` [r, in], `up` [out, r] and perhaps `alpha` of each module.
        path: of the file, for the error message.

    Raises:
        ConfigError: a name belongs to no module of SD3 that a LoRA can be merged into here.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            raise _unknown(name, path)
        modules.setdefault(name.removesuffix(ending), {})[ENDINGS[ending]] = tensor
    renamed = {}
    for module, parts in modules.items():
        if not {"down", "up"} <= parts.keys():
            raise ConfigError(f"--lora {path}: {module} has no pair of down and up.")
        down, up = parts["down"], parts["up"]
        if "alpha" in parts:
            up = (up.float() * float(parts["alpha"]) / down.shape[0]).to(up.dtype)
        names = _in_diffusers(module, path)
        # Where a modulation is of a shift and a scale alone, diffusers has the scale first.
        halves = names[0].endswith(("norm1_context.linear", "norm_out.linear"))
        if halves and up.shape[0] == 2 * down.shape[1]:
            up = torch.cat(up.chunk(2)[::-1])
        for each, part in zip(names, up.chunk(len(names)), strict=True):
            renamed[f"{each}.lora_A.weight"] = down
            renamed[f"{each}.lora_B.weight"] = part.contiguous()
    return renamed


def _in_diffusers(module: str, path: Path) -> list[str]:
    """Return the names of a module in diffusers' model."""
    for prefix, encoder in ENCODERS.items():
        if module.startswith(prefix) and (
            found := OF_ENCODER.fullmatch(module.removeprefix(prefix))
        ):
            layer, *rest = (part for part in found.groups() if part)
            return [f"{encoder}.text_model.encoder.layers.{layer}.{'.'.join(rest)}"]
    bare = module.replace(".", "_")
    for prefix in ("lora_unet_", "diffusion_model_", "transformer_"):
        bare = bare.removeprefix(prefix)
    if bare in OUTSIDE:
        return [f"transformer.{OUTSIDE[bare]}"]
    found = re.fullmatch(r"joint_blocks_(\d+)_(x_block|context_block)_(\w+)", bare)
    if found and found[3] in STREAMS[found[2]]:
        block = f"transformer.transformer_blocks.{found[1]}"
        return [f"{block}.{name}" for name in STREAMS[found[2]][found[3]]]
    raise _unknown(module, path)


def _unknown(name: str, path: Path) -> ConfigError:
    of_t5 = " (T5's LoRAs are merged by no part of diffusers)" if "lora_te3" in name else ""
    return ConfigError(f"--lora {path}: {name} is no module of SD3 that can be changed{of_t5}.")
