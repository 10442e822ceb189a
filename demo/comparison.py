"""What diffusers' train_controlnet_sd3.py would have cost, the reference, beside this project.

The script encodes the prompt of every row before training, repeated prompts too, and keeps the
embeddings in float32 with CLIP's part padded to T5's width. It runs the VAE on image and
conditioning image at each step. The VAE is timed here, on this machine; the rest is calculated.
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
    """The encoding work of one run, by the reference and by this project.

    Attributes:
        num_rows: of the data set.
        num_prompts: distinct ones, with the empty one.
        num_pictures_reference: that go through the VAE, again at each step.
        num_pictures: that go through the VAE, once.
        prompt_bytes_reference: of all rows' embeddings.
        prompt_bytes: of the text shards.
        latent_bytes: of latent and conditioning shards; the reference keeps none.
        vae_seconds_per_picture: measured, at training's batch size.
        encoder_bytes: of the weights of VAE and text encoders in float32. The reference keeps them
            in memory during training.
    """

    num_rows: int
    num_prompts: int
    num_pictures_reference: int
    num_pictures: int
    prompt_bytes_reference: int
    prompt_bytes: int
    latent_bytes: int
    vae_seconds_per_picture: float
    encoder_bytes: int

    @property
    def vae_seconds_reference(self) -> float:
        """Seconds that the VAE alone would have taken during training."""
        return self.vae_seconds_per_picture * self.num_pictures_reference

    @property
    def vae_seconds(self) -> float:
        """Seconds that the VAE takes on all pictures once."""
        return self.vae_seconds_per_picture * self.num_pictures


def compare(config: DemoConfig, steps: int) -> Comparison:
    """Return the comparison for a finished run.

    Args:
        config: its settings.
        steps: of training.
    """
    cache = manifest.load(config.precompute.cache)
    text = cache.text_spec
    tokens = text.clip_tokens + text.max_sequence_length
    floats_per_prompt = tokens * text.t5_width + text.pooled_width
    conditioning = cache.conditioning[config.precompute.conditioning_name]
    batch = config.train.train_batch_size
    base = config.precompute.pretrained_model_name_or_path
    pipeline = StableDiffusion3Pipeline.from_pretrained(base, transformer=None, dtype=torch.float32)
    encoders = (
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.text_encoder_2,
        pipeline.text_encoder_3,
    )
    return Comparison(
        num_rows=config.circles.num_rows,
        num_prompts=cache.text.num_records,
        num_pictures_reference=2 * batch * config.train.gradient_accumulation_steps * steps,
        num_pictures=cache.latents.num_records + conditioning.num_records,
        prompt_bytes_reference=config.circles.num_rows * floats_per_prompt * FLOAT32_BYTES,
        prompt_bytes=cache.text.num_bytes,
        latent_bytes=cache.latents.num_bytes + conditioning.num_bytes,
        vae_seconds_per_picture=_time_vae(pipeline.vae, batch, config),
        encoder_bytes=sum(encoder.num_parameters() for encoder in encoders) * FLOAT32_BYTES,
    )


@torch.no_grad()
def _time_vae(vae: AutoencoderKL, batch: int, config: DemoConfig) -> float:
    """Return the seconds per picture of encoding a batch, the median of a few."""
    device = pick_device(config.precompute.device)
    keep_freed_memory(device)
    vae.to(device)
    side = config.precompute.resolution
    pictures = 2 * torch.rand(batch, 3, side, side) - 1
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        vae.encode(pictures.to(device)).latent_dist.mean.cpu()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / batch  # without the first, which warms up
