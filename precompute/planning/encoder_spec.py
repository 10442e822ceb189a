"""What the encoders give and what determines it, read from a base model's configurations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageColor

from common.errors import ConfigError
from precompute.planning.digest_cache import DigestCache
from precompute.planning.fingerprint import hash_component
from sd3.pretrained import read_config
from shards.format.specs import LatentSpec, TextSpec

# Above this a whole picture's activations take more memory than many cards have.
TILED_ABOVE_PX = 1024
CLIP_COMPONENTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
T5_COMPONENTS = ("tokenizer_3", "text_encoder_3")
COMPONENTS = (*(name for pair in CLIP_COMPONENTS for name in pair), *T5_COMPONENTS)


@dataclass(frozen=True)
class TextSettings:
    """What determines the embeddings of a prompt, besides the weights."""

    max_sequence_length: int
    compute_dtype: str
    cache_dtype: str


def text_spec(base: Path, settings: TextSettings) -> TextSpec:
    """Return the shapes that the base model's encoders will give, from their configurations.

    Raises:
        ConfigError: a configuration lacks a width.
    """
    widths = {
        (component, name): _width(base, component, name)
        for component, name in (
            ("text_encoder", "hidden_size"),
            ("text_encoder_2", "hidden_size"),
            ("text_encoder", "projection_dim"),
            ("text_encoder_2", "projection_dim"),
            ("text_encoder_3", "d_model"),
        )
    }
    return TextSpec(
        clip_tokens=clip_tokens(base),
        clip_width=widths["text_encoder", "hidden_size"] + widths["text_encoder_2", "hidden_size"],
        max_sequence_length=settings.max_sequence_length,
        t5_width=widths["text_encoder_3", "d_model"],
        pooled_width=widths["text_encoder", "projection_dim"]
        + widths["text_encoder_2", "projection_dim"],
        dtype=settings.cache_dtype,
    )


def _width(base: Path, component: str, name: str) -> int:
    width = read_config(base, component).get(name)
    if not isinstance(width, int):
        raise ConfigError(f"{base / component / 'config.json'}: no {name} in it.")
    return width


def clip_tokens(base: Path) -> int:
    """Return the CLIP prompt length: the stock pipeline takes the first tokenizer's for both."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base / CLIP_COMPONENTS[0][0])
    return int(tokenizer.model_max_length)


def text_identity(
    base: Path, variant: str | None, settings: TextSettings, remembered: DigestCache
) -> dict[str, Any]:
    """Return everything that the bytes of a text record depend on, but for the prompt."""
    return {
        **{name: hash_component(base / name, variant, remembered) for name in COMPONENTS},
        "max_sequence_length": settings.max_sequence_length,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
    }


@dataclass(frozen=True)
class LatentSettings:
    """What determines the latent of an image, besides the weights.

    Attributes:
        resolution_px: of the square, or whose square the buckets' area is.
        shapes: width and height of each bucket, in pixels.
    """

    resolution_px: int
    shapes: list[tuple[int, int]]
    posterior: str
    compute_dtype: str
    cache_dtype: str
    background: str

    @property
    def tiled(self) -> bool:
        """Whether the VAE takes a picture in overlapping tiles."""
        return self.resolution_px > TILED_ABOVE_PX

    def grids(self, vae_scale_factor: int) -> list[tuple[int, int]]:
        """Return height and width of the latents of each bucket."""
        return [
            (height // vae_scale_factor, width // vae_scale_factor) for width, height in self.shapes
        ]


def latent_spec(base: Path, settings: LatentSettings, pixel_range: str) -> LatentSpec:
    """Return the shape and scaling of the latents, from the VAE's configuration.

    Raises:
        ConfigError: the configuration is not that of an SD3 VAE.
    """
    config = read_config(base, "vae")
    try:
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        return LatentSpec(
            latent_channels=int(config["latent_channels"]),
            vae_scale_factor=factor,
            scaling_factor=float(config["scaling_factor"]),
            shift_factor=float(config["shift_factor"]),
            posterior=settings.posterior,
            pixel_range=pixel_range,
            dtype=settings.cache_dtype,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'vae' / 'config.json'}: not the VAE of an SD3 model ({error!r}); its "
            "configuration must have latent_channels, scaling_factor and shift_factor."
        ) from error


def latent_identity(
    base: Path, variant: str | None, settings: LatentSettings, remembered: DigestCache
) -> dict[str, Any]:
    """Return everything that the bytes of a latent record depend on, but for the image."""
    return {
        "vae": hash_component(base / "vae", variant, remembered),
        "resolution": settings.resolution_px,
        "buckets": [list(shape) for shape in settings.shapes],
        "geometry": "upright; resize to cover, bilinear; centre crop",
        "tiled": settings.tiled,
        "background": list(ImageColor.getrgb(settings.background)),
        "posterior": settings.posterior,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
    }
