"""The two networks of training: the frozen SD3 transformer and the ControlNet grown from it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from shards.errors import ConfigError
from shards.manifest import LatentSpec, Manifest
from shards.pretrained import component_variant, read_config

DEFAULT_NUM_LAYERS = 12
# How the data was made, in the ControlNet's config.json. diffusers keeps entries with a leading
# underscore and passes them over when it builds the model.
DATA_KEY = "_precompute"


def check_base(base: Path, manifest: Manifest) -> None:
    """Hold the cache against the base model's configuration, before any weights are read.

    Raises:
        ConfigError: with what the cache holds beside what the model needs.
    """
    config = read_config(base, "transformer")
    text, latent = manifest.text_spec, manifest.latent_spec
    try:
        patch = int(config["patch_size"])
        largest = int(config["pos_embed_max_size"])
        rows = [
            ("latent channels", latent.latent_channels, int(config["in_channels"])),
            ("T5 width (joint_attention_dim)", text.t5_width, int(config["joint_attention_dim"])),
            (
                "pooled width (pooled_projection_dim)",
                text.pooled_width,
                int(config["pooled_projection_dim"]),
            ),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{base / 'transformer' / 'config.json'}: not an SD3 transformer ({error!r})."
        ) from error
    wrong = [
        f"  {name}: cache {found}, model {expected}"
        for name, found, expected in rows
        if found != expected
    ]
    side = max(latent.height, latent.width)
    if side > patch * largest:
        wrong.append(
            f"  latent side: cache {side}, model at most {patch * largest} (pos_embed_max_size)"
        )
    if latent.height % patch or latent.width % patch:
        wrong.append(f"  latent size: cache {latent.height} x {latent.width}, patches of {patch}")
    if wrong:
        listing = "\n".join(wrong)
        raise ConfigError(
            f"the cache does not fit the base model {base}:\n{listing}\n"
            "Run python -m precompute with this base model, or train on the one the cache was "
            f"made with ({manifest.made_by.get('base')})."
        )


def load_scheduler(base: Path) -> FlowMatchEulerDiscreteScheduler:
    """Return the base model's noise schedule."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")


def load_transformer(base: Path, variant: str | None, dtype: torch.dtype) -> SD3Transformer2DModel:
    """Return the base model's transformer, frozen."""
    transformer = SD3Transformer2DModel.from_pretrained(
        base,
        subfolder="transformer",
        variant=component_variant(base / "transformer", variant),
        dtype=dtype,
        use_safetensors=True,
    )
    return transformer.requires_grad_(False).eval()


def new_controlnet(
    transformer: SD3Transformer2DModel, num_layers: int | None
) -> SD3ControlNetModel:
    """Return a ControlNet that starts as a copy of the transformer's first blocks and does nothing.

    Unlike `SD3ControlNetModel.from_transformer` this leaves the transformer's configuration alone
    and says in the saved one that training used the real pooled embedding and the VAE's shift.

    Args:
        transformer: the base model's.
        num_layers: blocks; by default 12, or one fewer than the transformer has.

    Raises:
        ConfigError: the transformer has too few blocks. Its last one drops the text stream and
            cannot be copied.
    """
    available = int(transformer.config.num_layers) - 1
    wanted = min(DEFAULT_NUM_LAYERS, available) if num_layers is None else num_layers
    if wanted > available:
        raise ConfigError(
            f"--num-controlnet-layers {wanted}: the base model's {available + 1} blocks allow at "
            f"most {available} (its last block has no text stream to copy)."
        )
    config = dict(transformer.config) | {
        "num_layers": wanted,
        "extra_conditioning_channels": 0,
        "force_zeros_for_pooled_projection": False,
    }
    controlnet = SD3ControlNetModel.from_config(
        {key: value for key, value in config.items() if not key.startswith("_")}
    )
    for name in ("pos_embed", "time_text_embed", "context_embedder"):
        getattr(controlnet, name).load_state_dict(getattr(transformer, name).state_dict())
    for copy, block in zip(
        controlnet.transformer_blocks, transformer.transformer_blocks, strict=False
    ):
        copy.load_state_dict(block.state_dict())
    return controlnet.float()


def load_controlnet(folder: Path) -> SD3ControlNetModel:
    """Return a ControlNet to go on from, in float32."""
    return SD3ControlNetModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def check_controlnet(controlnet: SD3ControlNetModel, transformer: SD3Transformer2DModel) -> None:
    """Hold a ControlNet against the base model.

    Raises:
        ConfigError: with what the ControlNet has beside what the model needs.
    """
    names = (
        "in_channels",
        "patch_size",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
    )
    wrong = [
        f"  {name}: ControlNet {controlnet.config[name]}, model {transformer.config[name]}"
        for name in names
        if controlnet.config[name] != transformer.config[name]
    ]
    if wrong:
        raise ConfigError("the ControlNet does not fit the base model:\n" + "\n".join(wrong))


def freeze_unused(controlnet: SD3ControlNetModel) -> None:
    """Freeze what cannot receive a gradient: the end of the last block's text stream.

    Nobody reads what it computes. Left trainable, it would make distributed training wait for
    gradients that never come, or search for them at each step.
    """
    last = controlnet.transformer_blocks[-1]
    for module in (last.ff_context, last.attn.to_add_out):
        module.requires_grad_(False)


def data_entry(manifest: Manifest, conditioning: LatentSpec) -> dict[str, Any]:
    """Return what inference must know of the data a ControlNet was trained on."""
    return {
        "max_sequence_length": manifest.text_spec.max_sequence_length,
        "conditioning_range": conditioning.pixel_range,
        "height": conditioning.height * conditioning.vae_scale_factor,
        "width": conditioning.width * conditioning.vae_scale_factor,
        "latents_fingerprint": manifest.latents.fingerprint,
        "text_fingerprint": manifest.text.fingerprint,
    }
