"""The model card of a miniature base: what it is, how it was made, how good it is."""

from diffusers import StableDiffusion3Pipeline

from common.provenance import versions
from demo.base_model import train_flow, train_vae
from demo.base_model.pipeline import CLIP_TOKENS
from demo.base_model.quality import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, Quality
from demo.base_model.shapes import BASE_PX, HELD_OUT_PAIRS, TRAINED_PAIRS

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def model_card(pipeline: StableDiffusion3Pipeline, quality: Quality, seed: int) -> str:
    """Return the card as Markdown."""
    config = pipeline.transformer.config
    sizes = "\n".join(
        f"| {name} | {type(model).__name__} | {model.num_parameters() / 1e6:.2f} M |"
        for name in MODELS
        for model in [getattr(pipeline, name)]
    )
    made_with = ", ".join(
        f"{name} {version}"
        for name, version in versions().items()
        if name in ("torch", "diffusers", "transformers")
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A miniature Stable Diffusion 3 that draws circles

Shaped like Stable Diffusion 3 in every respect but size: all nine components, stock classes, 16 latent channels, f8,
two CLIP encoders and T5, joint attention. It draws one thing, "<colour> circle with <colour> background" in the CSS
colour names, at {BASE_PX} x {BASE_PX} pixels. It exists so that the pipeline around it can be tried, tested and watched
without a GPU and without a download. It contains no weights of any other model.

| component | class | parameters |
|---|---|---|
{sizes}

The transformer has {config.num_layers} blocks of width {config.num_attention_heads * config.attention_head_dim}. All
three encoders read {CLIP_TOKENS} tokens: pass `max_sequence_length={CLIP_TOKENS}`.
It knows no other words than the captions'.

## How it was made

`python -m demo.base_model.train_base --seed {seed}`, from nothing, on circles drawn for it. Made with {made_with}.

1. VAE: {train_vae.NUM_STEPS} steps of {train_vae.BATCH} crops of discs and of outlines, squared error.
2. Transformer and text encoders together: {train_flow.NUM_STEPS} steps of {train_flow.BATCH} by flow matching on discs'
   latents, noise levels logit-normal and shifted by {train_flow.SHIFT:g}, {train_flow.EMPTY_PROMPTS:.0%} empty prompts;
   their exponential moving average is what is saved, in 16 bit.

Of the {len(TRAINED_PAIRS) + len(HELD_OUT_PAIRS)} pairs of colours, {len(HELD_OUT_PAIRS)} were never shown to
transformer and text encoders: those whose names' SHA-256 says so (`is_held_out` in `demo/colors.py`). The VAE was
trained on all colours.

## How good it is

On circles and pairs of colours that it was not trained on:

| | |
|---|---|
| VAE on discs | {quality.disc_psnr_db:.1f} dB PSNR |
| VAE on outlines | {quality.outline_psnr_db:.1f} dB PSNR |
| scaled latents of discs | mean {quality.latent_mean:.3f}, standard deviation {quality.latent_std:.3f} |
| background, by prompt alone | {quality.background_color_error:.1f} CIEDE2000, median of {quality.num_prompts} pictures |
| disc, by prompt alone | {quality.patch_color_error:.1f} CIEDE2000, median of {quality.patches} pictures |

A CIEDE2000 difference of 1 is just noticeable. Colours it knows; shapes less: of {quality.num_prompts} pictures by prompt alone
({NUM_INFERENCE_STEPS} steps, guidance scale {GUIDANCE_SCALE:g}) {quality.patches} had something on the background, and in {quality.discs} that was round. Where the
circle goes and how round it gets is what a ControlNet has to teach it.
"""
