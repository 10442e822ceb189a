"""Placement of a pipeline's models: on the device for good, or in host memory until needed.

diffusers' own model offloading keeps T5 beside the VAE and the ControlNet, and the VAE beside both
networks; its sequential offloading copies each layer while the device waits, and takes no
quantised layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from common.device import free_memory
from common.errors import ConfigError
from infer.config import Offload
from precompute.memory.layer_groups import bring_in_groups
from train.memory.streamed_base import StreamedBlocks

# Models that compute in turn, and so are on the device together.
TOGETHER = (
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
    ("vae",),
    ("controlnet", "transformer"),
)


def check_offload(offload: str, device: torch.device) -> None:
    """Check that a device can have models offloaded from it.

    Raises:
        ConfigError: it is the CPU.
    """
    if device.type == "cpu" and offload not in ("auto", "none"):
        raise ConfigError(f"--offload {offload}: the CPU is where models are offloaded to.")


def place(pipeline: Any, offload: Offload, device: torch.device) -> None:
    """Move a pipeline's models to a device, or have them come when they are needed.

    With `model` and `groups` only the models that compute together are on the device; of T5, which
    is larger than all others, a layer or two at a time. With `groups` transformer and ControlNet
    stay, and their blocks visit two places there in turn. `place_controlnet` follows.

    Args:
        pipeline: pipeline without a ControlNet, with all models in host memory.
        offload: which of these.
        device: device to compute on.
    """
    if offload == "none":
        pipeline.to(device)
        return
    if t5 := pipeline.components.get("text_encoder_3"):
        bring_in_groups(t5, device)
    if offload == "groups":
        _stream_blocks([pipeline.transformer], device)
    take_turns(pipeline, offload, device)


def place_controlnet(pipeline: Any, offload: Offload, device: torch.device) -> None:
    """Place a pipeline's ControlNet, which is in host memory, beside models that are placed."""
    if offload == "none":
        pipeline.controlnet.to(device)
        return
    if offload == "groups":
        controlnet = pipeline.controlnet
        _stream_blocks(getattr(controlnet, "nets", [controlnet]), device)
    take_turns(pipeline, offload, device)


def take_turns(pipeline: Any, offload: Offload, device: torch.device) -> None:
    """Have each of a pipeline's models come when it computes, and those of other times leave.

    This replaces what was said before of models that the pipeline shares with another.

    Args:
        pipeline: pipeline with placed models.
        offload: `model` or `groups`.
        device: device to compute on.
    """
    found = pipeline.components
    fixed = ["text_encoder_3"] + (["controlnet", "transformer"] if offload == "groups" else [])
    stationary = [found.get(name) for name in fixed]  # models that are not moved whole
    sets = [[found.get(name) for name in names] for names in TOGETHER]
    sets = [[model for model in models if model is not None] for models in sets]
    for models in sets:
        others = [model for other in sets if other is not models for model in other]
        moving = [other for other in others if all(other is not one for one in stationary)]
        for model in models:
            comes = all(model is not one for one in stationary)
            add_hook_to_module(model, Visit(device, moving, comes=comes))


def _stream_blocks(networks: Sequence[Any], device: torch.device) -> None:
    for network in networks:
        StreamedBlocks(network.requires_grad_(False), len(network.transformer_blocks), device)


class Visit(ModelHook):  # type: ignore[misc]
    """Before a model computes, sends those away that compute at other times, and brings it.

    Args:
        device: where it computes. The pipeline reads it there too.
        others: models that make room for it.
        comes: whether it must be brought.
    """

    def __init__(self, device: torch.device, others: Sequence[nn.Module], *, comes: bool) -> None:
        self.execution_device = device
        self.others, self.comes = others, comes

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Make room, and bring the model."""
        for other in self.others:
            if next(other.parameters()).device.type != "cpu":
                other.to("cpu")
                free_memory()
        if self.comes:
            module.to(self.execution_device)
        return args, kwargs
