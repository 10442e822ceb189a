"""The model card of a miniature base: what it is, how it was made, how good it is."""

from diffusers import StableDiffusion3Pipeline

from common.provenance import versions
from demo.base_model import train_flow, train_vae
from demo.base_model.pipeline import CLIP_TOKENS
from demo.base_model.quality import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, Quality
from demo.base_model.shapes import BASE_PX, HELD_OUT_PAIRS, TRAINED_PAIRS

MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def model_card(pipeline: StableDiffusion3Pipeline, quality: Quality, seed: int) -> str:
    """Return the card as Markdown.

    Args:
        pipeline: the base.
        quality: its figures.
        seed: that it was trained with.
    """
    return "\n".join([_description(pipeline), _how_it_was_made(seed), _figures(quality)])


def _description(pipeline: StableDiffusion3Pipeline) -> str:
    config = pipeline.transformer.config
    models = {name: getattr(pipeline, name) for name in MODELS}
    rows = "\n".join(
        f"| {name} | {type(model).__name__} | {model.num_parameters() / 1e6:.2f} M |"
        for name, model in models.items()
    )
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A miniature Stable Diffusion 3 that draws circles

It has the structure of Stable Diffusion 3 and differs in size alone: all nine components, stock classes, 16 latent
channels, f8, two CLIP encoders and T5, joint attention. It draws one thing, "<colour> circle with <colour> background"
in the CSS colour names, at {BASE_PX} x {BASE_PX} pixels. With it the pipeline around it can be tried, tested and watched
without a GPU and without a download. It contains no weights of any other model.

| component | class | parameters |
|---|---|---|
{rows}

The transformer has {config.num_layers} blocks of width {config.num_attention_heads * config.attention_head_dim}. All three encoders read {CLIP_TOKENS} tokens: pass `max_sequence_length={CLIP_TOKENS}`.
It knows only the words of these captions.
"""


def _how_it_was_made(seed: int) -> str:
    libraries = ("torch", "diffusers", "transformers")
    made_with = ", ".join(
        f"{name} {version}" for name, version in versions().items() if name in libraries
    )
    return f"""## How it was made

`python -m demo.base_model.train_base --seed {seed}`, from random weights, on circles drawn for it. Made with {made_with}.

1. VAE: {train_vae.NUM_STEPS} steps of {train_vae.BATCH} crops of discs and of outlines, squared error.
2. Transformer and text encoders together: {train_flow.NUM_STEPS} steps of {train_flow.BATCH} by flow matching on discs'
   latents, noise levels logit-normal and shifted by {train_flow.SHIFT:g}, {train_flow.EMPTY_PROMPTS:.0%} empty prompts.
   The exponential moving average of the weights is saved, in 16 bit.

Of the {len(TRAINED_PAIRS) + len(HELD_OUT_PAIRS)} pairs of colours, {len(HELD_OUT_PAIRS)} were never shown to
transformer and text encoders; `is_held_out` in `demo/colors.py` chooses them by the SHA-256 of their names. The VAE was
trained on all colours.
"""


def _figures(quality: Quality) -> str:
    by_prompt = quality.by_prompt
    return f"""## How good it is

On circles and pairs of colours that it was not trained on:

| | |
|---|---|
| VAE on discs | {quality.disc_psnr_db:.1f} dB PSNR |
| VAE on outlines | {quality.outline_psnr_db:.1f} dB PSNR |
| scaled latents of discs | mean {quality.latent_mean:.3f}, standard deviation {quality.latent_std:.3f} |
| colour difference of the background, by prompt alone | {by_prompt.background_color_error:.1f} CIEDE2000, median of {by_prompt.num_pictures} pictures |
| colour difference of the disc, by prompt alone | {by_prompt.patch_color_error:.1f} CIEDE2000, median of {by_prompt.num_patches} pictures |

A CIEDE2000 colour difference of 0 is the exact colour, about 2 is barely visible; lower is better.

The base draws colours better than shapes: of {by_prompt.num_pictures} pictures by prompt alone ({NUM_INFERENCE_STEPS} steps, guidance scale {GUIDANCE_SCALE:g}),
{by_prompt.num_patches} had something on the background, and in {by_prompt.num_discs} of them it was round. A ControlNet has to teach it where the circle
goes, and to draw it round.
"""
