"""What the encoders compute, and what their results depend on, from the base model's files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from PIL import ImageColor

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.fingerprints.digest_cache import DigestCache
from precompute.fingerprints.fingerprint import hash_component, hash_file
from sd3.base.find import find_base
from sd3.base.lora import Lora, find_loras
from sd3.base.without_t5 import T5_COMPONENTS, uses_t5
from sd3.buckets import bucket_shapes
from sd3.images import BACKGROUND
from sd3.pretrained import has_component, largest_side, read_config, vae_factor
from sd3.value_scale import AS_IS
from shards.format.specs import ConditioningSpec, LatentSpec, TextSpec

# Above this the activations of a whole image take more memory than many GPUs have.
TILED_ABOVE_PX = 1024
CLIP_COMPONENTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
# What a record's bytes depend on besides its content; plain JSON values.
Identity = dict[str, Any]


@dataclass(frozen=True)
class TextSettings:
    """The settings that the embeddings of a prompt depend on.

    Attributes:
        width_without_t5: width of the zeros that stand for T5's embedding; None with T5.
    """

    max_sequence_length: int
    compute_dtype: str
    cache_dtype: str
    allow_tf32: bool
    width_without_t5: int | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Tokenizers and text encoders that are used, as the base's folders are named."""
        return text_components(with_t5=self.width_without_t5 is None)


def text_components(*, with_t5: bool) -> tuple[str, ...]:
    """Return the folders of tokenizers and text encoders."""
    clips = tuple(name for pair in CLIP_COMPONENTS for name in pair)
    return clips + T5_COMPONENTS if with_t5 else clips


def text_spec(base: Path, settings: TextSettings) -> TextSpec:
    """Return the shapes of the embeddings, from the configurations of the text encoders.

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
        )
    }
    t5_width = settings.width_without_t5 or _width(base, "text_encoder_3", "d_model")
    return TextSpec(
        clip_tokens=clip_tokens(base),
        clip_width=widths["text_encoder", "hidden_size"] + widths["text_encoder_2", "hidden_size"],
        max_sequence_length=settings.max_sequence_length,
        t5_width=t5_width,
        pooled_width=widths["text_encoder", "projection_dim"]
        + widths["text_encoder_2", "projection_dim"],
        dtype=settings.cache_dtype,
        without_t5=True if settings.width_without_t5 else None,
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
    base: Path,
    variant: str | None,
    settings: TextSettings,
    digests: DigestCache,
    *,
    loras: Sequence[Lora] = (),
    former: bool = False,
) -> Identity:
    """Return everything that the bytes of a text record depend on besides the prompt.

    With `former`, as former versions of this program wrote it.
    """
    components = {
        name: hash_component(base / name, variant, digests, former=former)
        for name in settings.components
    }
    return {
        **components,
        "max_sequence_length": settings.max_sequence_length,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
        **_products_in_full(settings.compute_dtype, settings.allow_tf32),
        **_merged(loras, digests),
    }


def _merged(loras: Sequence[Lora], digests: DigestCache) -> Identity:
    """Return the entry for LoRAs that are merged into the text encoders; none without any."""
    merged = [[hash_file(lora.path, digests).hex(), lora.scale] for lora in loras]
    return {"loras": merged} if merged else {}


def _products_in_full(compute_dtype: str, allow_tf32: bool) -> Identity:
    """Return the entry for float32 products that are not rounded to TensorFloat-32.

    Where they may be there is none, as it was when this made no difference.
    """
    return {"allow_tf32": False} if compute_dtype == "float32" and not allow_tf32 else {}


@dataclass(frozen=True)
class LatentSettings:
    """The settings that the latent of an image depends on.

    Attributes:
        resolution_px: side of the square images; with buckets, of the square of the same area.
        shapes: width and height of each bucket, in pixels.
    """

    resolution_px: int
    shapes: list[tuple[int, int]]
    posterior: str
    compute_dtype: str
    cache_dtype: str
    background: str
    allow_tf32: bool

    @property
    def tiled(self) -> bool:
        """Whether the VAE encodes an image in overlapping tiles."""
        return self.resolution_px > TILED_ABOVE_PX

    @property
    def largest_shape(self) -> tuple[int, int]:
        """Width and height of the bucket with the most pixels."""
        return max(self.shapes, key=lambda shape: shape[0] * shape[1])


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
    base: Path,
    variant: str | None,
    settings: LatentSettings,
    digests: DigestCache,
    *,
    former: bool = False,
) -> Identity:
    """Return everything that the bytes of a latent record depend on besides the image.

    With `former`, as former versions of this program wrote it: the background was a part of it,
    which now stands for white; see `products.over_background`.
    """
    return {
        "vae": hash_component(base / "vae", variant, digests),
        "resolution": settings.resolution_px,
        "buckets": [list(shape) for shape in settings.shapes],
        "geometry": "upright; resize to cover, bilinear; centre crop",
        "tiled": settings.tiled,
        "background": list(ImageColor.getrgb(settings.background if former else BACKGROUND)),
        "posterior": settings.posterior,
        "compute_dtype": settings.compute_dtype,
        "cache_dtype": settings.cache_dtype,
        **_products_in_full(settings.compute_dtype, settings.allow_tf32),
    }


@dataclass(frozen=True)
class EncoderSpecs:
    """The encoders of a run and what they compute.

    Attributes:
        base: folder of the base model.
        loras: merged into its text encoders; none that leaves them as they are.
        text_settings: what the text encoders are run with.
        latent_settings: what the VAE is run with.
        text: shapes of a prompt's embeddings.
        latents: shape and scaling of an image's latent.
        conditioning: shape and scaling of a conditioning image's latent.
    """

    base: Path
    loras: Sequence[Lora]
    text_settings: TextSettings
    latent_settings: LatentSettings
    text: TextSpec
    latents: LatentSpec
    conditioning: ConditioningSpec

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Height and width of the latents of each bucket."""
        factor = self.latents.vae_scale_factor
        return [
            (height // factor, width // factor) for width, height in self.latent_settings.shapes
        ]


def text_settings(config: PrecomputeConfig) -> TextSettings:
    """Return what a run's text encoders are run with.

    Raises:
        ConfigError: without T5: the base's transformer, whose width the zeros have, is not found.
    """
    width = None
    if not uses_t5(config.pretrained_model_name_or_path, wanted=config.t5):
        base = find_base(
            config.pretrained_model_name_or_path,
            ("transformer",),
            revision=config.revision,
            cache_dir=config.cache_dir,
            weights=False,
            single_file_config=config.single_file_config,
        )
        width = _width(base, "transformer", "joint_attention_dim")
    return TextSettings(
        config.max_sequence_length, config.text_dtype, config.cache_dtype, config.allow_tf32, width
    )


def latent_settings(config: PrecomputeConfig) -> LatentSettings:
    """Return what a run's VAE is run with."""
    side = config.resolution
    return LatentSettings(
        side,
        bucket_shapes(side) if config.buckets else [(side, side)],
        config.posterior,
        config.vae_dtype,
        config.cache_dtype,
        config.background,
        config.allow_tf32,
    )


def read_specs(base: Path, config: PrecomputeConfig) -> EncoderSpecs:
    """Return what the encoders compute, from the base model's configurations and the settings.

    Raises:
        ConfigError: a configuration is not that of an SD3 model, or the transformer, where it is
            beside the encoders, has no positions for pictures so large.
    """
    of_text, of_latents = text_settings(config), latent_settings(config)
    if has_component(base, "transformer"):
        _check_positions(base, of_latents)
    return EncoderSpecs(
        base,
        _text_loras(config),
        of_text,
        of_latents,
        text_spec(base, of_text),
        latent_spec(base, of_latents, "-1_1"),
        _conditioning_spec(base, of_latents, config),
    )


def _text_loras(config: PrecomputeConfig) -> list[Lora]:
    """Return the LoRAs that change text encoders; say so of those that do not."""
    loras = find_loras(config.lora, config.lora_scale, config.cache_dir)
    for lora in loras:
        if not lora.changes_text:
            click.echo(
                f"--lora {lora.path}: changes the transformer alone; the cache is as without it",
                err=True,
            )
    return [lora for lora in loras if lora.changes_text]


def _conditioning_spec(
    base: Path, settings: LatentSettings, config: PrecomputeConfig
) -> ConditioningSpec:
    latents = latent_spec(base, settings, config.conditioning_range)
    red, green, blue = ImageColor.getrgb(config.background)[:3]
    is_white = config.background == BACKGROUND or (red, green, blue) == (255, 255, 255)
    scale = config.conditioning_scale
    return ConditioningSpec(
        **asdict(latents),
        background=None if is_white else (red, green, blue),
        scale=None if scale == AS_IS else scale,
        inpainting=True if config.inpainting else None,
    )


def _check_positions(base: Path, settings: LatentSettings) -> None:
    largest = largest_side(read_config(base, "transformer")) * vae_factor(base)
    if max(max(shape) for shape in settings.shapes) > largest:
        raise ConfigError(
            f"--resolution {settings.resolution_px}: the base has positions for {largest} px "
            "a side at most; give less."
        )
