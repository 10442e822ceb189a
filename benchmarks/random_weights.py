"""SD3's models at their true size with random weights, for measurements."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks.bases import VAE
from common.atomic_files import write_text
from common.device import default_dtype
from demo.base_model.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from sd3.prompt_embeds import CLIP_TOKENS

# Library and class of each component, as model_index.json has them.
COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5Tokenizer"),
}


def save_encoders(folder: Path, *, dtype: torch.dtype, layers: int | None = None) -> None:
    """Save CLIP-L, CLIP-G, T5-XXL and the VAE in a base model's folder: 11 GB in 16 bit.

    Args:
        folder: folder of the base model.
        dtype: number format of the weights.
        layers: number of layers of each text encoder; SD3's own if None.
    """
    torch.manual_seed(0)
    # Never in 32 bit, in which T5 takes 19 GB; and a CPU draws its weights for minutes.
    with default_dtype(dtype), _fastest_device():
        for suffix, model in text_encoders(layers):
            model.save_pretrained(folder / f"text_encoder{suffix}")
            tokenizer = (
                build_t5_tokenizer() if suffix == "_3" else build_clip_tokenizer(CLIP_TOKENS)
            )
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
    AutoencoderKL.from_config(VAE).save_pretrained(folder / "vae")


def save_transformer(folder: Path, config: dict[str, Any], *, weights: bool = True) -> None:
    """Save a transformer with random weights in 16 bit, and a scheduler, in a base model's folder.

    Args:
        folder: folder of the base model.
        config: configuration of the transformer.
        weights: whether weights are saved beside the configuration.
    """
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    if not weights:
        (folder / "transformer").mkdir(parents=True)
        write_text(folder / "transformer/config.json", json.dumps(config))
        return
    torch.manual_seed(0)
    with default_dtype(torch.bfloat16), _fastest_device():
        SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")


def save_index(folder: Path) -> None:
    """Save what makes a base model of saved parts: the file that names them all."""
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": diffusers.__version__}
    write_text(folder / "model_index.json", json.dumps(index | COMPONENTS))


def save_configurations(folder: Path, transformer: dict[str, Any]) -> None:
    """Save a base model without its weights: some kilobytes, from which memory is counted.

    Args:
        folder: folder of the base model.
        transformer: configuration of the transformer.
    """
    save_transformer(folder, transformer, weights=False)
    with torch.device("meta"):
        for suffix, model in text_encoders():
            model.config.save_pretrained(folder / f"text_encoder{suffix}")
        AutoencoderKL.from_config(VAE).save_config(folder / "vae")


def _fastest_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def num_encoder_parameters() -> int:
    """Return the number of weights of the three text encoders and the VAE."""
    with torch.device("meta"):
        models = [AutoencoderKL.from_config(VAE), *(model for _, model in text_encoders())]
        return sum(int(model.num_parameters()) for model in models)


def text_encoders(layers: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield CLIP-L, CLIP-G and T5-XXL with random weights, each with its folder's suffix.

    Args:
        layers: number of layers of each; SD3's own if None.
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
