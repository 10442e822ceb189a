"""Configurations of the published base models, for models with random weights."""

from pathlib import Path
from typing import Any

from common.config_file import read_section
from train.config import TrainConfig

_SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
# Transformers, by the names of the files in configs/.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3-medium": _SD3,
    "sd35-medium": _SD3
    | {
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35-large": _SD3
    | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
# The VAE of all three.
VAE: dict[str, Any] = {
    "sample_size": 1024,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}


def train_settings(base: str) -> dict[str, Any]:
    """Return the settings of training that configs/ has for a base."""
    return read_section(Path(f"configs/{base}.toml"), "train", TrainConfig)


def published(name: str) -> str | None:
    """Return which of `TRANSFORMERS` a base of this hub id has, or None."""
    ids = {train_settings(base).get("pretrained_model_name_or_path"): base for base in TRANSFORMERS}
    return ids.get(name)
