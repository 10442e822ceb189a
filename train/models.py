"""The two networks of training: the frozen SD3 transformer, and the ControlNet."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

from common.errors import ConfigError
from sd3.base.lora import Lora, merge_loras
from sd3.controlnet.kinds import PICTURE_ALONE, ControlNetKind, kind_of
from sd3.controlnet.picture_blocks import of_one_attention, queries_and_keys_anew
from sd3.controlnet.pooled_projection import (
    DEFAULT_POOLED_PROJECTION,
    FORCE_ZEROS,
    PooledProjection,
)
from sd3.finite import check_finite
from sd3.pretrained import component_variant, read_config
from sd3.quantized import quantize
from train.checkpointing import checkpoint_blocks
from train.config import TrainConfig

DEFAULT_NUM_LAYERS = 12
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def mixed_precision(config: TrainConfig) -> str:
    """Return the precision of a run: that of accelerate's configuration unless it is given.

    Raises:
        ConfigError: training does not support it.
    """
    found = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if found not in WEIGHT_DTYPES:
        raise ConfigError(
            f"accelerate's configuration says mixed_precision: {found}; training supports "
            f"{', '.join(WEIGHT_DTYPES)}: give --mixed-precision bf16. (--quantize-base fp8 stores "
            "the base in 8 bit.)"
        )
    return found


def load_scheduler(base: Path) -> FlowMatchEulerDiscreteScheduler:
    """Return the base model's noise schedule."""
    return FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")


def load_transformer(
    base: Path, variant: str | None, dtype: torch.dtype, loras: Sequence[Lora] = ()
) -> SD3Transformer2DModel:
    """Return the base model's transformer.

    Args:
        base: folder of the base model.
        variant: variant of its weight files.
        dtype: number format of its weights.
        loras: to merge into them.

    Raises:
        ConfigError: a weight is not finite, or a LoRA was made for another model.
    """
    transformer = SD3Transformer2DModel.from_pretrained(
        base,
        subfolder="transformer",
        variant=component_variant(base / "transformer", variant),
        dtype=dtype,
        use_safetensors=True,
    )
    merge_loras(transformer, "transformer", loras)
    check_finite(transformer, f"base model {base}, as {dtype}".replace("torch.", ""))
    return transformer


def new_controlnet(
    base: Path,
    variant: str | None,
    num_layers: int | None,
    pooled_projection: PooledProjection = DEFAULT_POOLED_PROJECTION,
    extra_channels: int = 0,
    kind: ControlNetKind = "joint",
) -> SD3ControlNetModel:
    """Return a ControlNet that starts as a copy of the transformer's first blocks and does nothing.

    It differs from `SD3ControlNetModel.from_transformer` in two ways. The saved configuration says
    in which convention it is trained. And the weights are copied as they are stored, whatever
    precision the frozen transformer is loaded in.

    Of the kind `stability` its blocks are copies of the picture's stream; see
    `sd3.controlnet.picture_blocks`.

    Args:
        base: folder of the base model.
        variant: variant of its weight files.
        num_layers: blocks; by default 12, or half the transformer's if that is less.
        pooled_projection: the convention that it is to be trained in.
        extra_channels: that it is controlled by beside those of a latent: 1 for inpainting.
        kind: what its blocks read.

    Returns:
        The ControlNet in float32.

    Raises:
        ConfigError: the transformer has too few blocks.
    """
    with init_empty_weights():  # to fill a billion weights at random would take seconds
        controlnet = SD3ControlNetModel.from_config(
            controlnet_config(base, num_layers, pooled_projection, extra_channels, kind)
        )
    shapes = {name: tensor.shape for name, tensor in controlnet.state_dict().items()}
    own = {
        name: torch.zeros(shape)
        for name, shape in shapes.items()
        if name.startswith(("controlnet_blocks.", "pos_embed_input."))
    }
    if kind == "stability" and read_config(base, "transformer").get("qk_norm") is not None:
        own |= queries_and_keys_anew(controlnet)
    shared = read_weights(base / "transformer", variant, shapes.keys() - own.keys())
    if kind == "stability":
        shared = {
            name: of_one_attention(name, weight, shapes[name][0]) for name, weight in shared.items()
        }
    copies = {name: weight.to(torch.float32, copy=True) for name, weight in shared.items()}
    controlnet.load_state_dict(own | copies, assign=True)
    return controlnet


def controlnet_config(
    base: Path,
    num_layers: int | None,
    pooled_projection: PooledProjection = DEFAULT_POOLED_PROJECTION,
    extra_channels: int = 0,
    kind: ControlNetKind = "joint",
) -> dict[str, Any]:
    """Return the configuration of a new ControlNet.

    Args:
        base: folder of the base model.
        num_layers: blocks; by default 12, or half the transformer's if that is less.
        pooled_projection: the convention that it is to be trained in.
        extra_channels: that it is controlled by beside those of a latent: 1 for inpainting.
        kind: what its blocks read.

    Raises:
        ConfigError: the transformer has too few blocks.
    """
    config = read_config(base, "transformer")
    # The transformer adds each of N residuals to L / N blocks in a row, and none to its last block.
    # So with more than L / 2 residuals the last one would have no effect.
    available = int(config["num_layers"]) // 2
    wanted = min(DEFAULT_NUM_LAYERS, available) if num_layers is None else num_layers
    if not 1 <= wanted <= available:
        raise ConfigError(
            f"--num-controlnet-layers {wanted}: a base model of {config['num_layers']} blocks "
            f"supports 1 to {available} ControlNet blocks."
        )
    return (
        {key: value for key, value in config.items() if not key.startswith("_")}
        | {
            "num_layers": wanted,
            "extra_conditioning_channels": extra_channels,
            FORCE_ZEROS: pooled_projection == "zeros",
        }
        | (PICTURE_ALONE if kind == "stability" else {})
    )


def read_weights(component: Path, variant: str | None, names: set[str]) -> dict[str, Tensor]:
    """Return some of a component's weights as stored, reading no others.

    Raises:
        ConfigError: its files lack one.
    """
    kind = component_variant(component, variant)
    weights: dict[str, Tensor] = {}
    for path in sorted(component.glob(f"*.{kind}*safetensors" if kind else "*.safetensors")):
        if kind is None and path.name.count(".") > 1:
            continue  # another variant's
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in names & set(file.keys())}
    if missing := names - weights.keys():
        raise ConfigError(f"{component}: {len(missing)} weights are missing, {min(missing)} first.")
    return weights


def load_controlnet(folder: Path) -> SD3ControlNetModel:
    """Return a ControlNet to continue from, in float32.

    Raises:
        ConfigError: a weight is not finite.
    """
    controlnet = SD3ControlNetModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    )
    check_finite(controlnet, f"--controlnet-model-name-or-path {folder}")
    return controlnet


def prepare_base(
    config: TrainConfig, transformer: Any, quantize: Callable[..., None] = quantize
) -> None:
    """Freeze, quantise and checkpoint the base's transformer as the settings ask, in place.

    Training and the simulation of its memory both call this, so that they cannot differ; likewise
    `prepare_controlnet`.

    Args:
        config: settings of the run.
        transformer: unquantised, in the precision of the run.
        quantize: a replacement for `sd3.quantized.quantize`.
    """
    transformer.requires_grad_(False).eval()
    if config.quantize_base is not None:
        quantize(transformer, config.quantize_base)
    if config.checkpointing in ("selective", "full"):
        checkpoint_blocks(transformer, selective=config.checkpointing == "selective")


def prepare_controlnet(config: TrainConfig, controlnet: Any) -> None:
    """Freeze what is dead of a ControlNet in float32, cast and checkpoint it, in place."""
    freeze_unused(controlnet)
    if config.bf16_weights:
        cast(controlnet, torch.bfloat16)
    controlnet.train()
    if config.checkpointing != "none":
        checkpoint_blocks(controlnet, selective=config.checkpointing == "selective")


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters and buffers of a network in place.

    Positional embeddings are included; they take up to a gigabyte. diffusers' own `to` warns when
    it converts them. Tensors without numbers, as in a simulation, can only be replaced.
    """
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            converted = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            setattr(module, name, converted)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(dtype))


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the optimiser changes."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def freeze_unused(controlnet: SD3ControlNetModel) -> None:
    """Freeze what gets no gradient: the end of the last block's text stream, which has no effect.

    If it were trainable, distributed training would wait for gradients that never come, or search
    for them at each step. Stability's blocks have no text stream.
    """
    if kind_of(controlnet.config) == "stability":
        return
    last = controlnet.transformer_blocks[-1]
    for module in (last.ff_context, last.attn.to_add_out):
        module.requires_grad_(False)
