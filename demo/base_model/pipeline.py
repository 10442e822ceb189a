"""A miniature Stable Diffusion 3 base model of stock classes, with random weights.

It has all nine components of SD3 and SD3's structure: 16 latent channels, f8, two CLIP encoders
and T5, joint attention. The stock pipeline loads it. `demo.base_model.train_base` trains one; tests
use others.
"""

import shutil
from pathlib import Path

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from common.errors import ConfigError
from demo.base_model.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from demo.base_model.vae import build_vae

CLIP_TOKENS = 24  # the longest caption has 17 CLIP tokens
# As SD3's scheduler: more sampling steps at high noise.
SCHEDULER_SHIFT = 3.0
# As SD3's VAE.
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609


def build_pipeline(
    seed: int,
    *,
    num_layers: int = 6,
    num_attention_heads: int = 4,
    attention_head_dim: int = 16,
    clip_widths: tuple[int, int] = (32, 48),
    t5_width: int = 96,
    clip_tokens: int = CLIP_TOKENS,
    dual_attention_layers: tuple[int, ...] = (),
    qk_norm: str | None = "rms_norm",
) -> StableDiffusion3Pipeline:
    """Return a miniature SD3 pipeline with random weights.

    Args:
        seed: of the weights.
        num_layers: joint blocks of the transformer; a ControlNet can have half as many.
        num_attention_heads: of the transformer.
        attention_head_dim: of the transformer.
        clip_widths: of the two CLIP encoders; their sum is at most `t5_width`.
        t5_width: of T5.
        clip_tokens: CLIP prompt length; SD3 has 77.
        dual_attention_layers: blocks with a second attention; SD3.5-medium's first 13 have one.
        qk_norm: `rms_norm` as SD3.5, None as SD3.
    """
    torch.manual_seed(seed)  # the order in which the models are built decides their weights
    tokenizer = build_clip_tokenizer(clip_tokens)
    t5_tokenizer = build_t5_tokenizer()
    vae = build_vae()
    vae.register_to_config(scaling_factor=SCALING_FACTOR, shift_factor=SHIFT_FACTOR)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=num_layers,
        attention_head_dim=attention_head_dim,
        num_attention_heads=num_attention_heads,
        joint_attention_dim=t5_width,
        caption_projection_dim=num_attention_heads * attention_head_dim,
        pooled_projection_dim=sum(clip_widths),
        pos_embed_max_size=32,
        dual_attention_layers=dual_attention_layers,
        qk_norm=qk_norm,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        vae=vae,
        text_encoder=_build_clip(tokenizer, clip_widths[0], "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=_build_clip(tokenizer, clip_widths[1], "gelu"),
        tokenizer_2=build_clip_tokenizer(clip_tokens),
        text_encoder_3=_build_t5(len(t5_tokenizer), t5_width),
        tokenizer_3=t5_tokenizer,
    )


def _build_clip(
    tokenizer: CLIPTokenizer, width: int, activation: str
) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _build_t5(vocab_size: int, width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=24,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def check_replaceable(folder: Path) -> None:
    """Check that a model may be saved to `folder`.

    Raises:
        ConfigError: the folder holds something other than a pipeline.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ConfigError(f"--output-dir {folder}: holds other things than a model; name another.")


def save_base(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    """Save a pipeline, whole or not at all; it replaces an older one.

    Raises:
        ConfigError: the folder holds something other than a pipeline.
    """
    check_replaceable(folder)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        # A tokenizer keeps the padding and truncation of its last call, and would save them.
        backend = getattr(pipeline, name).backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
