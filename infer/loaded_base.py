"""A base model that is loaded once and draws with one ControlNet after another."""

from collections.abc import Sequence
from pathlib import Path

import click
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)

from common.device import (
    compile_blocks,
    free_gpu_bytes,
    free_memory,
    keep_freed_memory,
    pick_device,
)
from common.memory.need import GB
from infer.config import Offload, PipelineConfig
from infer.memory.estimate import choose_offload, need_with, simulate_sets
from infer.pipeline import TEXT_COMPONENTS
from infer.placement import check_offload, place, place_controlnet, take_turns
from infer.vae import save_memory
from sd3.base.lora import COMPONENTS, find_loras, merge_loras, say_text_is_cached
from sd3.base.without_t5 import T5_COMPONENTS, uses_t5
from sd3.controlnet.combined import together
from sd3.finite import check_finite
from sd3.inpainting import is_inpainting
from sd3.pretrained import component_variant
from sd3.quantized import quantize


class LoadedBase:
    """A base model on its device; only the ControlNets that it draws with are exchanged.

    Args:
        config: settings of the run, with a number format.
        base: folder of the base model.
        sets: folders of the ControlNets that will draw, of those that draw together.
        batch_size: pictures drawn at a time.
        with_text_encoders: whether the text encoders are loaded.

    Raises:
        ConfigError: --offload needs a device other than the CPU, or a LoRA cannot be merged.
    """

    def __init__(
        self,
        config: PipelineConfig,
        base: Path,
        sets: Sequence[Sequence[Path]],
        *,
        batch_size: int,
        with_text_encoders: bool = True,
    ) -> None:
        self.config = config
        self.device = pick_device(config.device)
        check_offload(config.offload, self.device)
        keep_freed_memory(self.device)
        free_memory()
        loras = find_loras(config.lora, config.lora_scale, config.cache_dir)
        self.offload = find_offload(
            config,
            base,
            sets,
            self.device,
            batch_size=batch_size,
            with_text_encoders=with_text_encoders,
        )
        with_t5 = uses_t5(config.pretrained_model_name_or_path, wanted=config.t5)
        absent = dict.fromkeys(() if with_t5 else T5_COMPONENTS)
        if not with_text_encoders:
            absent = dict.fromkeys(TEXT_COMPONENTS)
        self._stock = StableDiffusion3Pipeline.from_pretrained(
            base, dtype=getattr(torch, config.dtype), variant=_variant(base, config), **absent
        )
        if not with_text_encoders:
            say_text_is_cached(loras)
        for name in COMPONENTS if with_text_encoders else COMPONENTS[:1]:
            merge_loras(getattr(self._stock, name), name, loras)
        if config.shift is not None:
            self._stock.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
                self._stock.scheduler.config, shift=config.shift
            )
        if config.quantize_base is not None:
            quantize(
                self._stock.transformer.requires_grad_(False), config.quantize_base, self.device
            )
        save_memory(self._stock.vae, tiling=config.vae_tiling)
        if config.compile:
            compile_blocks(self._stock.transformer)
        place(self._stock, self.offload, self.device)

    def alone(self) -> StableDiffusion3Pipeline:
        """Return the stock pipeline without a ControlNet; the last one's must be let go of."""
        if self.offload != "none":
            take_turns(self._stock, self.offload, self.device)  # without the last ControlNet
        free_memory()
        return self._stock

    def with_controlnets(self, folders: Sequence[Path]) -> StableDiffusion3ControlNetPipeline:
        """Return the stock pipeline with a ControlNet, or with several that are combined.

        That for inpainting, if the ControlNet is for it.

        The pipeline before it must be let go of, so that its ControlNets leave memory first.

        Raises:
            ConfigError: a weight is not finite.
        """
        stock = self.alone()
        networks = [load_controlnet(folder, self.config) for folder in folders]
        stock_class = StableDiffusion3ControlNetPipeline
        if is_inpainting(networks[0].config):
            stock_class = StableDiffusion3ControlNetInpaintingPipeline
        controlnet = together(networks, stock.transformer.config.num_layers)
        pipeline = stock_class(**stock.components, controlnet=controlnet)
        if self.config.compile:
            compile_blocks(*networks)
        place_controlnet(pipeline, self.offload, self.device)
        return pipeline


def _variant(base: Path, config: PipelineConfig) -> str | None:
    """Return the variant of the settings, if any component has weights of it."""
    found = (component_variant(folder, config.variant) for folder in base.glob("*/"))
    return config.variant if any(found) else None


def load_controlnet(folder: Path, config: PipelineConfig) -> SD3ControlNetModel:
    """Return a ControlNet; with the convention `train_controlnet_sd3`, correct its configuration.

    diffusers' script trains with the pooled embedding and saves a configuration that zeroes it.

    Raises:
        ConfigError: a weight is not finite.
    """
    controlnet = SD3ControlNetModel.from_pretrained(folder, dtype=getattr(torch, config.dtype))
    check_finite(controlnet, f"--controlnet {folder}, as {config.dtype}")
    if config.convention == "train_controlnet_sd3":
        controlnet.register_to_config(force_zeros_for_pooled_projection=False)
    return controlnet


def find_offload(
    config: PipelineConfig,
    base: Path,
    sets: Sequence[Sequence[Path]],
    device: torch.device,
    *,
    batch_size: int,
    with_text_encoders: bool,
) -> Offload:
    """Return the offload of the settings; for `auto`, the fastest that fits a GPU's free memory.

    It must fit with each set of ControlNets.
    """
    if config.offload != "auto":
        return config.offload
    if device.type != "cuda":
        return "none"  # other devices share their memory with the host
    drawings = simulate_sets(
        config,
        base,
        sets,
        with_text_encoders=with_text_encoders,
        batch_size=batch_size,
    )
    free = free_gpu_bytes(str(device))
    assert free is not None
    chosen = choose_offload(config, drawings, free)
    if chosen != "none":
        whole, needed = (need_with(drawings, one).free / GB for one in ("none", chosen))
        click.echo(
            f"--offload {chosen}: needs {needed:.1f} GB, {whole:.1f} GB without it, and "
            f"{free / GB:.1f} GB of {device} are free",
            err=True,
        )
    return chosen
