"""A look into a cache: what its latents decode to, beside their captions."""

from pathlib import Path

import torch
from PIL import Image

from common.errors import ConfigError, ShardError
from sd3.contact_sheet import contact_sheet
from sd3.pretrained import read_config
from sd3.vae_decoder import decode, to_bytes
from shards.reading.cache import Cache
from shards.reading.order import Order


def preview(
    cache: Cache,
    base: Path,
    *,
    num_samples: int,
    seed: int,
    device: torch.device,
    variant: str | None = None,
) -> Image.Image:
    """Return a sheet of samples: image, conditioning image, caption.

    Args:
        cache: opened for reading.
        base: model folder with the VAE that the cache was made with.
        num_samples: at most; those that a training run with this seed begins with, where the
            cache has one bucket.
        seed: of the choice.
        device: where to decode.
        variant: of the VAE's weight files.

    Raises:
        ShardError: the cache holds no samples, or is damaged.
        ConfigError: another model's VAE.
    """
    product = cache.conditioning.product
    if not product.num_records:
        raise ShardError(f"{cache.files}: the cache holds no samples")
    channels = read_config(base, "vae").get("latent_channels")
    if channels != cache.manifest.latent_spec.latent_channels:
        raise ConfigError(
            f"{base}: its VAE has {channels} latent channels, the cache "
            f"{cache.manifest.latent_spec.latent_channels}; give the base that the cache was made "
            f"with ({cache.manifest.made_by.get('base')})."
        )
    order = Order(product.shard_records, seed=seed)
    captions, latents = [], []
    for place in range(min(num_samples, product.num_records)):
        key, tensors, prompts = cache.sample(*order.record(place))
        texts = [cache.text.about(*cache.text.locate(one)).get("prompt", "") for one in prompts]
        captions.append(f"{' | '.join(map(str, texts))} ({key})")
        latents += [tensors["latent"][None], tensors["conditioning_latent"][None]]
    pixels = decode(base, variant, latents, device)
    images = [Image.fromarray(to_bytes(one[0])) for one in pixels[::2]]
    pixel_range = cache.conditioning_spec.pixel_range
    controls = [Image.fromarray(to_bytes(one[0], pixel_range)) for one in pixels[1::2]]
    rows = list(zip(zip(images, controls, strict=True), captions, strict=True))
    return contact_sheet(rows, ("image", f"conditioning: {cache.conditioning_name}"))
