"""Training the miniature's transformer and text encoders together, by flow matching on circles.

The text encoders learn along with the transformer and are frozen ever after: with random ones the
colours never come out right. Resumes from the last saved state.

Axes: B samples, T tokens, W embedding width, C latent channels, h x w latent grid.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from demo.base_model.pipeline import CLIP_TOKENS, build_pipeline
from demo.base_model.shapes import PALETTE, TRAINED_PAIRS, caption, paint_discs
from demo.base_model.train_vae import save_state, update_average
from sd3.prompt_embeds import prompt_embeds
from train.objective import noised, scaled

NUM_STEPS = 4200
BATCH = 32
NUM_LATENTS = 16384
LEARNING_RATE = 2e-3
WARMUP_FRACTION = 0.1
SHIFT = 3.0  # of the scheduler: more time at high noise
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
    """Return `latent` [N, C, h, w], raw, float16, and `pair` [N, 2], colour indices.

    Discs in pairs of colours that are trained on; encoded once, then kept.
    """
    if not path.is_file():
        generator = torch.Generator().manual_seed(seed)
        shapes = torch.randint(len(masks), (NUM_LATENTS,), generator=generator)
        pairs = TRAINED_PAIRS[
            torch.randint(len(TRAINED_PAIRS), (NUM_LATENTS,), generator=generator)
        ]
        latents = []
        with torch.no_grad():
            for part in tqdm(torch.arange(NUM_LATENTS).split(BATCH), desc="latents"):
                pictures = paint_discs(masks[shapes[part]], PALETTE[pairs[part]])
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
    """Train the pipeline's transformer and text encoders in place; they end as their averages.

    Args:
        state_path: where the state is kept; training goes on from there.
        pipeline: its VAE's configuration has the scaling of `latents`.
        latents: see `load_latents`.
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
    start, history = 0, []
    if state_path.is_file():
        state = torch.load(state_path, map_location=device, weights_only=True)
        for name, part in (
            ("models", models),
            ("average", average),
            ("optimizer", optimizer),
            ("schedule", schedule),
        ):
            part.load_state_dict(state[name])
        start, history = state["step"], state["history"]
    config = pipeline.vae.config
    bar = tqdm(range(start, NUM_STEPS), desc="flow", initial=start, total=NUM_STEPS)
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        chosen = torch.randint(NUM_LATENTS, (BATCH,), generator=generator)
        latent = scaled(
            latents["latent"][chosen].float(), config.scaling_factor, config.shift_factor
        ).to(device)
        dropped = torch.rand(BATCH, generator=generator) < EMPTY_PROMPTS
        prompts = [
            "" if drop else caption(pair)
            for drop, pair in zip(dropped, latents["pair"][chosen], strict=True)
        ]
        noise = torch.randn(latent.shape, generator=generator).to(device)
        uniform = torch.sigmoid(torch.randn(BATCH, generator=generator)).to(device)
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        embeds, pooled = encode_prompts(pipeline, prompts, device)
        velocity = pipeline.transformer(
            hidden_states=noised(latent, noise, sigma),
            timestep=1000 * sigma,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample
        loss = (velocity - (noise - latent)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, models, min(EMA_DECAY, (step + 1) / (step + 10)))
        history.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            bar.set_postfix(loss=f"{sum(history[-SAVE_EVERY:]) / SAVE_EVERY:.4f}")
            save_state(
                state_path,
                {
                    "models": models.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                    "history": history,
                },
            )
    models.load_state_dict(average.state_dict())
    models.eval().requires_grad_(False)


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings [B, T, W] and pooled ones [B, W], with gradients.

    As the stock pipeline's `encode_prompt`, which computes none.
    """

    def ids(tokenizer: Any) -> Tensor:
        tokens = tokenizer(
            prompts,
            padding="max_length",
            max_length=CLIP_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        found: Tensor = tokens.input_ids
        return found.to(device)

    first, second = (
        encoder(ids(tokenizer), output_hidden_states=True)
        for tokenizer, encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        )
    )
    clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    t5 = pipeline.text_encoder_3(ids(pipeline.tokenizer_3))[0]
    return prompt_embeds(clip, t5), torch.cat([first[0], second[0]], dim=-1)
