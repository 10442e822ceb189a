"""What the reference's way would have cost: encoders at each step, every row's prompt stored.

diffusers' train_controlnet_sd3.py encodes the prompt of every row before training, repeated ones
too, and keeps it in float32 with CLIP's part padded to T5's width; and it runs the VAE on image and
conditioning image at each step. Its encoders are timed here, on this machine, and counted up.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline

from common.device import keep_freed_memory, pick_device
from demo.config import DemoConfig
from shards.format import manifest

FLOAT32_BYTES = 4
REPEATS = 3


@dataclass(frozen=True)
class Comparison:
    """One run's encoding work, the reference's way and this project's.

    Attributes:
        rows: of the data set.
        prompts: distinct ones, the empty one among them.
        pictures_reference: through the VAE, at each step anew.
        pictures: through the VAE, once.
        prompt_bytes_reference: of all rows' embeddings.
        prompt_bytes: of the text shards.
        latent_bytes: of latent and conditioning shards; the reference keeps none.
        vae_seconds_a_picture: measured, at training's batch size.
        encoder_bytes: of the VAE's and the text encoders' weights in float32, which the reference
            has in memory beside the networks that it trains with.
    """

    rows: int
    prompts: int
    pictures_reference: int
    pictures: int
    prompt_bytes_reference: int
    prompt_bytes: int
    latent_bytes: int
    vae_seconds_a_picture: float
    encoder_bytes: int

    @property
    def vae_seconds_reference(self) -> float:
        """What the VAE alone would have taken in training."""
        return self.vae_seconds_a_picture * self.pictures_reference


def compare(config: DemoConfig, steps: int) -> Comparison:
    """Return the comparison of a finished run of `steps` training steps."""
    contents = manifest.load(config.precompute.cache)
    text = contents.text_spec
    tokens = text.clip_tokens + text.max_sequence_length
    floats = tokens * text.t5_width + text.pooled_width
    conditioning = contents.conditioning[config.precompute.conditioning_name]
    batch = config.train.train_batch_size
    base = config.precompute.pretrained_model_name_or_path
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, transformer=None, dtype=torch.float32)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    weights = sum(model.num_parameters() for model in (pipeline.vae, *encoders))
    return Comparison(
        rows=config.circles.num_rows,
        prompts=contents.text.num_records,
        pictures_reference=2 * batch * config.train.gradient_accumulation_steps * steps,
        pictures=contents.latents.num_records + conditioning.num_records,
        prompt_bytes_reference=config.circles.num_rows * floats * FLOAT32_BYTES,
        prompt_bytes=contents.text.num_bytes,
        latent_bytes=contents.latents.num_bytes + conditioning.num_bytes,
        vae_seconds_a_picture=_seconds_a_picture(pipeline.vae, batch, config),
        encoder_bytes=weights * FLOAT32_BYTES,
    )


@torch.no_grad()
def _seconds_a_picture(vae: AutoencoderKL, batch: int, config: DemoConfig) -> float:
    device = pick_device(config.precompute.device)
    keep_freed_memory(device)
    vae.to(device)
    side = config.precompute.resolution
    pictures = 2 * torch.rand(batch, 3, side, side) - 1
    taken = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        vae.encode(pictures.to(device)).latent_dist.mean.cpu()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / batch
