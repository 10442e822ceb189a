"""`python -m demo.base`: a miniature Stable Diffusion 3 base model of stock classes.

It has all nine components of SD3 with SD3's shape (16 latent channels, f8, two CLIP encoders and
T5, joint attention), about 1.5 million random weights, and loads in the stock pipeline. Its
tokenizers are made from the colour names, so that a caption keeps its words.
"""

import json
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging as transformers_logging

from demo.colors import COLORS
from shards.options import CONTEXT

CLIP_TOKENS = 24  # the longest caption has 17 CLIP tokens
START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 32, 48, 96
# SD3's own shift: more time at high noise.
SCHEDULER_SHIFT = 3.0
# Of SD3's VAE.
SCALING_FACTOR, SHIFT_FACTOR = 1.5305, 0.0609


def captions() -> Iterator[str]:
    """Yield texts with all words of the demo's captions, for training tokenizers."""
    for name in COLORS:
        yield f"{name} circle with {name} background"


def build_pipeline(
    seed: int,
    *,
    num_layers: int = 6,
    num_attention_heads: int = 4,
    attention_head_dim: int = 16,
    clip_tokens: int = CLIP_TOKENS,
    dual_attention_layers: tuple[int, ...] = (),
    qk_norm: str | None = "rms_norm",
) -> StableDiffusion3Pipeline:
    """Return a miniature SD3 pipeline with random weights.

    Args:
        seed: of the weights.
        num_layers: joint blocks of the transformer; a ControlNet can have one fewer at most.
        num_attention_heads: of the transformer.
        attention_head_dim: of the transformer.
        clip_tokens: CLIP prompt length; SD3 has 77.
        dual_attention_layers: as SD3.5-medium has in its first 13 blocks.
        qk_norm: `rms_norm` as SD3.5, None as SD3.
    """
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(clip_tokens)
    t5 = t5_tokenizer()
    width = num_attention_heads * attention_head_dim
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=128,
    )
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
            pos_embed_max_size=32,
            dual_attention_layers=dual_attention_layers,
            qk_norm=qk_norm,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
        vae=vae,
        text_encoder=_clip(tokenizer, CLIP_L_WIDTH, clip_tokens, "quick_gelu"),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, CLIP_G_WIDTH, clip_tokens, "gelu"),
        tokenizer_2=clip_tokenizer(clip_tokens),
        text_encoder_3=T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=T5_WIDTH,
                d_kv=24,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer_3=t5,
    )


def clip_tokenizer(tokens: int) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose byte-pair encoding was trained on the captions."""
    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    trained.normalizer = blank.backend_tokenizer.normalizer
    trained.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(captions(), trainer)
    model = json.loads(trained.to_str())["model"]
    # CLIP takes its pooled output at the end token, which therefore is the padding as well.
    return CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        model_max_length=tokens,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Return a T5 tokenizer with a token for every word of the captions, and for every letter."""
    words = sorted({word for caption in captions() for word in caption.split()})
    # Log probabilities: a word is always likelier than its spelling.
    pieces = [(f"▁{word}", -5.0) for word in words]
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


def save_base(folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    """Save a pipeline so that the folder is there whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@click.command(context_settings=CONTEXT)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
def main(output_dir: Path, seed: int) -> None:
    """Build the miniature base model with random weights, unless it is there already."""
    transformers_logging.disable_progress_bar()
    if (output_dir / "model_index.json").is_file():
        click.echo(f"{output_dir}: the base model is there already")
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    save_base(output_dir, build_pipeline(seed))
    click.echo(f"{output_dir}: miniature SD3 base model built, random weights")


if __name__ == "__main__":
    main(prog_name="python -m demo.base")
