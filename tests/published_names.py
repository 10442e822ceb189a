"""Weights of an SD3 pipeline under the names and in the shapes that one-file checkpoints use.

The names are those of Stability AI's published files (`sd3_medium_incl_clips_t5xxlfp16.safetensors`
and others): joint blocks with one matrix for queries, keys and values, in which the two halves of
the last modulations are swapped; the VAE's as in latent diffusion.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EMBEDDERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
PICTURE = {
    "attn.to_out.0": "attn.proj",
    "attn.norm_q": "attn.ln_q",
    "attn.norm_k": "attn.ln_k",
    "attn2.to_out.0": "attn2.proj",
    "attn2.norm_q": "attn2.ln_q",
    "attn2.norm_k": "attn2.ln_k",
    "norm1.linear": "adaLN_modulation.1",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
TEXT = {
    "attn.to_add_out": "attn.proj",
    "attn.norm_added_q": "attn.ln_q",
    "attn.norm_added_k": "attn.ln_k",
    "norm1_context.linear": "adaLN_modulation.1",
    "ff_context.net.0.proj": "mlp.fc1",
    "ff_context.net.2": "mlp.fc2",
}
PRODUCTS = {
    "x_block.attn": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def one_file(pipeline: Any, *, text: bool = True, vae: bool = True) -> dict[str, Tensor]:
    """Return the tensors of a whole checkpoint."""
    tensors = {
        f"model.diffusion_model.{name}": tensor
        for name, tensor in transformer(pipeline.transformer.state_dict()).items()
    }
    if vae:
        tensors |= {
            f"first_stage_model.{name}": tensor for name, tensor in _vae(pipeline.vae).items()
        }
    if text:
        encoders = {
            "clip_l": pipeline.text_encoder,
            "clip_g": pipeline.text_encoder_2,
            "t5xxl": pipeline.text_encoder_3,
        }
        for kind, encoder in encoders.items():
            tensors |= {
                f"text_encoders.{kind}.transformer.{name}": tensor
                for name, tensor in encoder.state_dict().items()
                if (kind, name) != ("clip_l", "text_projection.weight")  # it has none: identity
            }
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def transformer(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's weights under the published names."""
    found = {name: tensor for name, tensor in weights.items() if "transformer_blocks" not in name}
    tensors = {}
    for ours, theirs in EMBEDDERS.items():
        for name in [name for name in found if name == ours or name.startswith(f"{ours}.")]:
            tensors[theirs + name.removeprefix(ours)] = found.pop(name)
    for part in ("weight", "bias"):
        name = f"final_layer.adaLN_modulation.1.{part}"
        tensors[name] = _halves_swapped(found.pop(f"norm_out.linear.{part}"))
    assert not found
    count = 1 + max(int(name.split(".")[1]) for name in weights if "transformer_blocks" in name)
    for number in range(count):
        prefix = f"transformer_blocks.{number}."
        block = {
            name.removeprefix(prefix): tensor
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        for name, tensor in _block(block, is_last=number == count - 1).items():
            tensors[f"joint_blocks.{number}.{name}"] = tensor
    return tensors


def _block(block: dict[str, Tensor], *, is_last: bool) -> dict[str, Tensor]:
    tensors = {}
    for attention, names in PRODUCTS.items():
        for part in ("weight", "bias"):
            if f"{names[0]}.{part}" in block:
                parts = [block.pop(f"{name}.{part}") for name in names]
                tensors[f"{attention}.qkv.{part}"] = torch.cat(parts)
    for stream, names in (("x_block", PICTURE), ("context_block", TEXT)):
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                if f"{ours}.{part}" in block:
                    tensor = block.pop(f"{ours}.{part}")
                    if is_last and ours == "norm1_context.linear":
                        tensor = _halves_swapped(tensor)
                    tensors[f"{stream}.{theirs}.{part}"] = tensor
    assert not block, block.keys()
    return tensors


def _halves_swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _vae(vae: Any) -> dict[str, Tensor]:
    count = len(vae.config.block_out_channels)
    tensors = {}
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d)\.resnets", lambda at: f"up.{count - 1 - int(at[1])}.block", new
        )
        new = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0",
            lambda at: f"up.{count - 1 - int(at[1])}.upsample",
            new,
        )
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda at: f"mid.block_{1 + int(at[1])}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1")
            new = new.replace("group_norm", "norm").replace("to_out.0", "proj_out")
            new = re.sub(r"to_([qkv])", r"\1", new)
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        tensors[new] = tensor
    return tensors
