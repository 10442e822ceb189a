"""SD3's text encoders and VAE at their true size, with random weights; for measurements alone."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from demo.base import clip_tokenizer, t5_tokenizer

CLIP_TOKENS = 77


def save_true_size(folder: Path, *, dtype: torch.dtype, layers: int | None = None) -> None:
    """Save CLIP-L, CLIP-G, T5-XXL and the VAE as a base model's folder: 11 GB in 16 bit.

    Args:
        folder: of the model.
        dtype: of the weights.
        layers: of each text encoder; as many as SD3's have if None.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # T5 in 32 bit, as it is made, is 19 GB
    try:
        for number, (name, width, depth, heads, activation) in enumerate(
            (("text_encoder", 768, 12, 12, "quick_gelu"), ("text_encoder_2", 1280, 32, 20, "gelu"))
        ):
            tokenizer = clip_tokenizer(CLIP_TOKENS)
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
            CLIPTextModelWithProjection(config).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / ("tokenizer_2" if number else "tokenizer"))
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
        T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
        t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    finally:
        torch.set_default_dtype(before)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    vae.save_pretrained(folder / "vae")
