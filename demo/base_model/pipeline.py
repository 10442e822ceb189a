"""A miniature Stable Diffusion 3 base model of stock classes, with random weights.

It has all nine components of SD3 with SD3's shape (16 latent channels, f8, two CLIP encoders and
T5, joint attention), and loads in the stock pipeline. Its tokenizers are made from the colour
names, so that a caption keeps its words. `demo.base_model.train_base` trains one; tests use others.
"""

import shutil
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from common.errors import ConfigError
from demo.base_model.vae import build_vae
from demo.colors import COLORS

CLIP_TOKENS = 24  # the longest caption has 17 CLIP tokens
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# SD3's own shift: more time at high noise.
SCHEDULER_SHIFT = 3.0
# Of SD3's VAE.
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609


def caption_words() -> list[str]:
    """Return the words of which the demo's captions are made, in alphabetical order."""
    names = " ".join(COLORS).split()
    return sorted({*names, "circle", "with", "background"})


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
        clip_widths: of the two CLIP encoders; together at most `t5_width`.
        t5_width: of T5.
        clip_tokens: CLIP prompt length; SD3 has 77.
        dual_attention_layers: as SD3.5-medium has in its first 13 blocks.
        qk_norm: `rms_norm` as SD3.5, None as SD3.
    """
    torch.manual_seed(seed)
    tokenizer = build_clip_tokenizer(clip_tokens)
    t5 = build_t5_tokenizer()
    width = num_attention_heads * attention_head_dim
    vae = build_vae()
    vae.register_to_config(scaling_factor=SCALING_FACTOR, shift_factor=SHIFT_FACTOR)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=t5_width,
            caption_projection_dim=width,
            pooled_projection_dim=sum(clip_widths),
            pos_embed_max_size=32,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        vae=vae,
        text_encoder=_clip(tokenizer, clip_widths[0], clip_tokens, "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, clip_widths[1], clip_tokens, "gelu"),
        tokenizer_2=build_clip_tokenizer(clip_tokens),
        text_encoder_3=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=t5_width,
                d_kv=24,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        ),
        tokenizer_3=t5,
    )


def build_clip_tokenizer(tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair encoding has a token for every word of the captions.

    The encoding is worked out here because the trainer of `tokenizers` breaks ties by chance, and
    a seed must give one base model.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(caption_words())
    pieces = [START, END, *letters, *(letter + WORD_END for letter in letters)]
    pieces += [left + right for left, right in merges]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=tokens,
    )


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges, in order, that make each of some ASCII words one piece.

    The most frequent pair goes first, the alphabetically first of equals.
    """
    spelled = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for pieces in spelled for pair in pairwise(pieces)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in spelled:
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def build_t5_tokenizer() -> T5TokenizerFast:
    """Return a T5 tokenizer with a token for every word of the captions, and for every letter."""
    # Log probabilities: a word is always likelier than its spelling.
    pieces = [(f"▁{word}", -5.0) for word in caption_words()]
    letters = [(letter, -10.0) for letter in ("▁", *string.ascii_letters, *string.digits)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces, *letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def _clip(tokenizer: Any, width: int, tokens: int, activation: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokens,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def check_replaceable(folder: Path) -> None:
    """Refuse to put a model in the place of something else.

    Raises:
        ConfigError: the folder holds something other than a pipeline.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ConfigError(f"--output-dir {folder}: holds other things than a model; name another.")


def save_base(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    """Save a pipeline so that the folder is there whole or not at all, replacing an older one.

    Raises:
        ConfigError: see `check_replaceable`.
    """
    check_replaceable(folder)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        # What the last call asked for stays in a tokenizer, and would be saved with it.
        backend = getattr(pipeline, name).backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
