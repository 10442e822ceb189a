"""A contact sheet of a cache: what its latents decode to, with their captions."""

from pathlib import Path

import torch
from PIL import Image

from common.device import pick_device
from common.errors import ConfigError, ShardError
from sd3.base.find import find_base
from sd3.contact_sheet import contact_sheet
from sd3.pretrained import read_config
from sd3.vae_decoder import decode, to_bytes
from shards.reading.cache import Cache
from shards.reading.order import Order


def preview(
    cache: Cache,
    base: str,
    *,
    num_samples: int,
    seed: int,
    device: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Image.Image:
    """Return a sheet of samples: image, conditioning image, caption.

    Args:
        cache: opened for reading.
        base: model folder or hub id; the VAE must be the one that the cache was made with.
        num_samples: at most; those that a training run with this seed begins with, if the cache
            has one bucket.
        seed: of the choice.
        device: where to decode; the best there is by default.
        revision: of the base model on the hub.
        variant: of the VAE's weight files.

    Raises:
        ShardError: the cache holds no samples, or is damaged.
        ConfigError: another model's VAE, or no such device.
    """
    folder = find_base(base, ("vae",), revision=revision, variant=variant)
    where = pick_device(device)
    _check_vae(cache, folder)
    captions, latents = _choose(cache, num_samples, seed)
    pixels = decode(folder, variant, latents, where)
    images = [Image.fromarray(to_bytes(image[0])) for image in pixels[::2]]
    pixel_range = cache.conditioning_spec.pixel_range
    controls = [Image.fromarray(to_bytes(image[0], pixel_range)) for image in pixels[1::2]]
    rows = list(zip(zip(images, controls, strict=True), captions, strict=True))
    return contact_sheet(rows, ("image", f"conditioning: {cache.conditioning_name}"))


def _check_vae(cache: Cache, folder: Path) -> None:
    channels = read_config(folder, "vae").get("latent_channels")
    if channels != cache.manifest.latent_spec.latent_channels:
        raise ConfigError(
            f"{folder}: its VAE has {channels} latent channels, the cache "
            f"{cache.manifest.latent_spec.latent_channels}; give the base that the cache was made "
            f"with ({cache.manifest.made_by.get('base')})."
        )


def _choose(cache: Cache, num_samples: int, seed: int) -> tuple[list[str], list[torch.Tensor]]:
    """Return captions of samples, and for each sample its latent and conditioning latent."""
    product = cache.conditioning.product
    if not product.num_records:
        raise ShardError(f"{cache.files}: the cache holds no samples")
    order = Order(product.shard_records, seed=seed)
    captions, latents = [], []
    for place in range(min(num_samples, product.num_records)):
        key, tensors, prompt_keys = cache.sample(*order.record(place))
        prompts = [
            str(cache.text.metadata(*cache.text.locate(prompt_key)).get("prompt", ""))
            for prompt_key in prompt_keys
        ]
        captions.append(f"{' | '.join(prompts)} ({key})")
        latents += [tensors["latent"][None], tensors["conditioning_latent"][None]]
    return captions, latents
