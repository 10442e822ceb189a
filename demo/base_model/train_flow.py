"""Training the miniature's transformer and text encoders together, by flow matching on circles.

The text encoders learn here and are frozen ever after: with random ones the colours never come out
right. Training resumes from the last saved state.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from demo.base_model.pipeline import CLIP_TOKENS, build_pipeline
from demo.base_model.shapes import PALETTE, TRAINED_PAIRS, caption, paint_discs
from demo.base_model.training_state import (
    load_state,
    save_state,
    states_of,
    update_average,
)
from sd3.prompt_embeds import prompt_embeds
from train.objective import noised, scaled

NUM_STEPS = 4200
BATCH = 32
NUM_LATENTS = 16384
LEARNING_RATE = 2e-3
WARMUP_FRACTION = 0.1
SHIFT = 3.0  # of the noise levels: more training at high noise
EMPTY_PROMPTS = 0.1  # so that classifier-free guidance works
EMA_DECAY = 0.998
SAVE_EVERY = 100
TRAINED = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def build_miniature(seed: int) -> StableDiffusion3Pipeline:
    """Return the miniature's architecture with random weights, about 4 million."""
    return build_pipeline(
        seed,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        clip_widths=(64, 64),
        t5_width=128,
    )


def load_latents(path: Path, vae: AutoencoderKL, masks: Tensor, seed: int) -> dict[str, Tensor]:
    """Return latents of discs in random pairs of colours to train on; made once, then kept.

    Args:
        path: file of the latents.
        vae: the trained VAE, on its device.
        masks: of discs, [N, H, W], 0 to 255.
        seed: of discs and colours.

    Returns:
        `latent` [NUM_LATENTS, C, h, w], not scaled, float16, and `pair` [NUM_LATENTS, 2], indices
        of disc colour and background.
    """
    if not path.is_file():
        generator = torch.Generator().manual_seed(seed)
        shapes = torch.randint(len(masks), (NUM_LATENTS,), generator=generator)
        pairs = TRAINED_PAIRS[
            torch.randint(len(TRAINED_PAIRS), (NUM_LATENTS,), generator=generator)
        ]
        latents = []
        with torch.no_grad():
            for batch in tqdm(torch.arange(NUM_LATENTS).split(BATCH), desc="latents"):
                pictures = paint_discs(masks[shapes[batch]], PALETTE[pairs[batch]])
                latent = vae.encode(pictures.to(vae.device)).latent_dist.mean
                latents.append(latent.to("cpu", torch.float16))
        save_file({"latent": torch.cat(latents), "pair": pairs}, path)
    return load_file(path)


def train_flow(
    state_path: Path,
    pipeline: StableDiffusion3Pipeline,
    latents: dict[str, Tensor],
    device: torch.device,
    seed: int,
) -> None:
    """Train a pipeline's transformer and text encoders in place; their averaged weights stay.

    Args:
        state_path: file of the state; training continues from it.
        pipeline: its VAE's configuration has the scaling of `latents`.
        latents: what `load_latents` returns.
        device: where to train.
        seed: of the batches and the noise.
    """
    models = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
    models.to(device).train().requires_grad_(True)
    average = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(models.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, NUM_STEPS, pct_start=WARMUP_FRACTION
    )
    parts = {"models": models, "average": average, "optimizer": optimizer, "schedule": schedule}
    state = load_state(state_path, parts, device)
    start, history = state.get("step", 0), state.get("history", [])
    bar = tqdm(range(start, NUM_STEPS), desc="flow", initial=start, total=NUM_STEPS)
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        loss = flow_loss(pipeline, draw_batch(latents, pipeline.vae, generator), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, models, step, EMA_DECAY)
        history.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            bar.set_postfix(loss=f"{sum(history[-SAVE_EVERY:]) / SAVE_EVERY:.4f}")
            save_state(state_path, states_of(parts) | {"step": step + 1, "history": history})
    models.load_state_dict(average.state_dict())
    models.eval().requires_grad_(False)


@dataclass(frozen=True)
class FlowBatch:
    """Samples of one step.

    Attributes:
        latent: scaled, [B, C, h, w].
        prompts: captions, some of them replaced by the empty prompt.
        noise: standard normal, [B, C, h, w].
        sigma: noise levels, [B].
    """

    latent: Tensor
    prompts: list[str]
    noise: Tensor
    sigma: Tensor


def draw_batch(
    latents: dict[str, Tensor], vae: AutoencoderKL, generator: torch.Generator
) -> FlowBatch:
    """Return a random batch, on the CPU.

    Args:
        latents: what `load_latents` returns.
        vae: its configuration has the scaling of the latents.
        generator: of samples, empty prompts, noise and noise levels.
    """
    chosen = torch.randint(NUM_LATENTS, (BATCH,), generator=generator)
    latent = latents["latent"][chosen].float()
    dropped = torch.rand(BATCH, generator=generator) < EMPTY_PROMPTS
    prompts = [
        "" if drop else caption(pair)
        for drop, pair in zip(dropped, latents["pair"][chosen], strict=True)
    ]
    noise = torch.randn(latent.shape, generator=generator)
    logit_normal = torch.sigmoid(torch.randn(BATCH, generator=generator))
    return FlowBatch(
        latent=scaled(latent, vae.config.scaling_factor, vae.config.shift_factor),
        prompts=prompts,
        noise=noise,
        sigma=SHIFT * logit_normal / (1 + (SHIFT - 1) * logit_normal),
    )


def flow_loss(pipeline: StableDiffusion3Pipeline, batch: FlowBatch, device: torch.device) -> Tensor:
    """Return the mean squared error of the predicted velocity, noise - latent."""
    latent, noise, sigma = (part.to(device) for part in (batch.latent, batch.noise, batch.sigma))
    embeds, pooled = encode_prompts(pipeline, batch.prompts, device)
    velocity = pipeline.transformer(
        hidden_states=noised(latent, noise, sigma),
        timestep=1000 * sigma,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
    ).sample
    error: Tensor = velocity - (noise - latent)
    return error.square().mean()


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings [B, T, W] and pooled ones [B, W], with gradients.

    The stock pipeline's `encode_prompt` gives the same, but without gradients.
    """
    first, second = (
        encoder(_token_ids(tokenizer, prompts).to(device), output_hidden_states=True)
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
    )
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    t5 = pipeline.text_encoder_3(_token_ids(pipeline.tokenizer_3, prompts).to(device))[0]
    return prompt_embeds(clip, t5), torch.cat([first[0], second[0]], dim=-1)


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Return token numbers, [B, CLIP_TOKENS]."""
    ids: Tensor = tokenizer(
        prompts,
        padding="max_length",
        max_length=CLIP_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids
