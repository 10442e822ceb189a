"""The two networks of training: the frozen SD3 transformer and the ControlNet grown from it."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor

from common.errors import ConfigError
from sd3.pretrained import component_variant, controlnet_mismatches, read_config
from sd3.quantized import quantize
from shards.format.manifest import Manifest
from shards.format.specs import LatentSpec

DEFAULT_NUM_LAYERS = 12


def load_scheduler(base: Path) -> FlowMatchEulerDiscreteScheduler:
    """Return the base model's noise schedule."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")


def load_transformer(
    base: Path,
    variant: str | None,
    dtype: torch.dtype,
    quantization: str | None = None,
    *,
    fp8_matmul: bool = False,
) -> SD3Transformer2DModel:
    """Return the base model's transformer, frozen.

    Args:
        base: folder of the base model.
        variant: variant of its weight files.
        dtype: of its arithmetic, and of its weights unless they are quantised.
        quantization: see `sd3.quantized`; None for none.
        fp8_matmul: likewise.
    """
    transformer = SD3Transformer2DModel.from_pretrained(
        base,
        subfolder="transformer",
        variant=component_variant(base / "transformer", variant),
        dtype=dtype,
        use_safetensors=True,
    )
    transformer.requires_grad_(False).eval()
    if quantization is not None:
        quantize(transformer, quantization, fp8_matmul=fp8_matmul)
    return transformer


def new_controlnet(base: Path, variant: str | None, num_layers: int | None) -> SD3ControlNetModel:
    """Return a ControlNet that starts as a copy of the transformer's first blocks and does nothing.

    Unlike `SD3ControlNetModel.from_transformer` this says in the saved configuration that training
    used the real pooled embedding and the VAE's shift, and it copies the weights as they are
    stored, whatever the precision that the frozen transformer is loaded in.

    Args:
        base: folder of the base model.
        variant: variant of its weight files.
        num_layers: blocks; by default 12, or half the transformer's if that is less.

    Returns:
        The ControlNet in float32.

    Raises:
        ConfigError: the transformer has too few blocks.
    """
    controlnet = SD3ControlNetModel.from_config(controlnet_config(base, num_layers))
    shared = {
        name
        for name in controlnet.state_dict()
        if not name.startswith(("controlnet_blocks.", "pos_embed_input."))
    }
    controlnet.load_state_dict(read_weights(base / "transformer", variant, shared), strict=False)
    return controlnet.float()


def controlnet_config(base: Path, num_layers: int | None) -> dict[str, Any]:
    """Return the configuration of a new ControlNet; see `new_controlnet`."""
    config = read_config(base, "transformer")
    # The transformer hands out N residuals to its L blocks in runs of L / N and has none for its
    # last block; so beyond L / 2 the ControlNet's last block would never be heard.
    available = int(config["num_layers"]) // 2
    wanted = min(DEFAULT_NUM_LAYERS, available) if num_layers is None else num_layers
    if not 1 <= wanted <= available:
        raise ConfigError(
            f"--num-controlnet-layers {wanted}: a base model of {config['num_layers']} blocks "
            f"listens to 1 to {available}."
        )
    return {key: value for key, value in config.items() if not key.startswith("_")} | {
        "num_layers": wanted,
        "extra_conditioning_channels": 0,
        "force_zeros_for_pooled_projection": False,
    }


def read_weights(component: Path, variant: str | None, names: set[str]) -> dict[str, Tensor]:
    """Return some of a component's weights as stored, reading no others.

    Raises:
        ConfigError: its files lack one.
    """
    kind = component_variant(component, variant)
    found: dict[str, Tensor] = {}
    for path in sorted(component.glob(f"*.{kind}*safetensors" if kind else "*.safetensors")):
        if kind is None and path.name.count(".") > 1:
            continue  # of a variant that was not asked for
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in names & set(file.keys())}
    if missing := names - found.keys():
        raise ConfigError(f"{component}: {len(missing)} weights are missing, {min(missing)} first.")
    return found


def load_controlnet(folder: Path) -> SD3ControlNetModel:
    """Return a ControlNet to go on from, in float32."""
    return SD3ControlNetModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def keep_in_bfloat16(controlnet: SD3ControlNetModel) -> None:
    """Cast all that a ControlNet consists of, in place; positions, up to a gigabyte, as well.

    diffusers' own `to` does so too, but not without a warning.
    """
    for tensor in (*controlnet.parameters(), *controlnet.buffers()):
        tensor.data = tensor.data.to(torch.bfloat16)


def check_controlnet(controlnet: SD3ControlNetModel, base: Path) -> None:
    """Hold a ControlNet to go on from against the base model and against what training gives it.

    Raises:
        ConfigError: with what the ControlNet has beside what is needed.
    """
    ours, theirs = dict(controlnet.config), read_config(base, "transformer")
    wrong = controlnet_mismatches(ours, theirs)
    needed = {
        "joint_attention_dim": theirs.get("joint_attention_dim"),
        "extra_conditioning_channels": 0,
        "use_pos_embed": True,
    }
    wrong += [
        f"  {name}: ControlNet {ours.get(name)}, training needs {value}"
        for name, value in needed.items()
        if ours.get(name) != value
    ]
    if int(ours["num_layers"]) > int(theirs["num_layers"]) // 2:
        wrong.append(f"  num_layers: ControlNet {ours['num_layers']}, base {theirs['num_layers']}")
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
    """Return what inference must know of the data a ControlNet was trained on.

    Its `height` and `width` are of the bucket that is nearest to a square, in pixels.
    """
    factor = conditioning.vae_scale_factor
    sizes = [(height * factor, width * factor) for height, width in manifest.buckets]
    height, width = min(sizes, key=lambda size: max(size) / min(size))
    return {
        "max_sequence_length": manifest.text_spec.max_sequence_length,
        "conditioning_range": conditioning.pixel_range,
        "height": height,
        "width": width,
        "buckets": sizes,
        "latents_fingerprint": manifest.latents.fingerprint,
        "text_fingerprint": manifest.text.fingerprint,
    }
