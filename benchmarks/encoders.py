"""SD3's text encoders and VAE at their true size, with random weights; for measurements alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.bases import VAE
from common.device import default_dtype
from demo.base_model.pipeline import build_clip_tokenizer, build_t5_tokenizer

CLIP_TOKENS = 77


def save_true_size(folder: Path, *, dtype: torch.dtype, layers: int | None = None) -> None:
    """Save CLIP-L, CLIP-G, T5-XXL and the VAE as a base model's folder: 11 GB in 16 bit.

    Args:
        folder: of the model.
        dtype: of the weights.
        layers: of each text encoder; as many as SD3's have if None.
    """
    torch.manual_seed(0)
    with default_dtype(dtype):  # T5 in 32 bit, as it is made, is 19 GB
        for suffix, model in text_encoders(layers):
            model.save_pretrained(folder / f"text_encoder{suffix}")
            tokenizer = (
                build_t5_tokenizer() if suffix == "_3" else build_clip_tokenizer(CLIP_TOKENS)
            )
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    AutoencoderKL.from_config(VAE).save_pretrained(folder / "vae")


def num_parameters() -> int:
    """Return how many weights the three text encoders and the VAE have."""
    with torch.device("meta"):
        models = [AutoencoderKL.from_config(VAE), *(model for _, model in text_encoders())]
        return sum(int(model.num_parameters()) for model in models)


def text_encoders(layers: int | None = None) -> Iterator[tuple[str, Any]]:
    """Give CLIP-L, CLIP-G and T5-XXL with random weights, each with the end of its folder's name.

    Args:
        layers: of each; as many as SD3's have if None.
    """
    tokenizer = build_clip_tokenizer(CLIP_TOKENS)
    for suffix, width, depth, heads, activation in (
        ("", 768, 12, 12, "quick_gelu"),
        ("_2", 1280, 32, 20, "gelu"),
    ):
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers or depth,
            num_attention_heads=heads,
            max_position_embeddings=CLIP_TOKENS,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        yield suffix, CLIPTextModelWithProjection(config)
    t5 = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=layers or 24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    yield "_3", T5EncoderModel(t5)
