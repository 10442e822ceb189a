"""The stock diffusers pipeline with ControlNets: finding the models, checking and loading them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import click
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    StableDiffusion3ControlNetPipeline,
)

from common.device import (
    compile_blocks,
    free_gpu_bytes,
    free_memory,
    keep_freed_memory,
    pick_device,
)
from common.errors import ConfigError, RunError
from common.memory.exhausted import first_line, is_out_of_memory
from common.memory.need import GB
from infer.config import Offload, PipelineConfig
from infer.memory.estimate import choose_offload, need_with, remedies, simulate_sets
from infer.placement import check_offload, place
from infer.vae import save_memory
from sd3.finite import check_finite
from sd3.pretrained import (
    controlnet_mismatches,
    find_base,
    find_controlnet,
    read_config,
)
from sd3.quantized import quantize

COMPONENTS = (
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)
TEXT_COMPONENTS = COMPONENTS[3:]
Config = TypeVar("Config", bound=PipelineConfig)


def with_dtype(config: Config) -> Config:
    """Return settings with the number format that `--dtype auto` is on their device."""
    if config.dtype != "auto":
        return config
    on_gpu = pick_device(config.device).type == "cuda"
    return replace(config, dtype="bfloat16" if on_gpu else "float32")


def find_models(
    config: PipelineConfig, controlnets: Sequence[str], components: Sequence[str] = COMPONENTS
) -> tuple[Path, list[Path]]:
    """Return the folders of the base model and of ControlNets that fit it; nothing is loaded.

    Args:
        config: settings of the run.
        controlnets: folders or hub ids.
        components: parts of the base model that must exist.

    Raises:
        ConfigError: a model cannot be found, a ControlNet's widths differ from the base's, or it
            takes more than a conditioning image.
    """
    base = find_base(
        config.pretrained_model_name_or_path,
        components,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    transformer = read_config(base, "transformer")
    folders = []
    for name in controlnets:
        folder = find_controlnet(name, "--controlnet", cache_dir=config.cache_dir)
        saved = read_config(folder, "")
        if extra := saved.get("extra_conditioning_channels"):
            channels = saved.get("in_channels", 16)
            raise ConfigError(
                f"--controlnet {name} takes {channels + extra} channels, as ControlNets for "
                f"inpainting do; a conditioning image has {channels}."
            )
        if wrong := controlnet_mismatches(saved, transformer):
            listing = "\n".join(wrong)
            raise ConfigError(
                f"--controlnet {name} was not trained for "
                f"{config.pretrained_model_name_or_path}:\n{listing}"
            )
        folders.append(folder)
    return base, folders


def short_titles(names: Sequence[str]) -> list[str]:
    """Return a short, unique title for each ControlNet: the last parts of its path or hub id.

    The folder `controlnet` in a checkpoint is left out: `out/checkpoint-500/controlnet` becomes
    `checkpoint-500`.
    """
    paths = [[part for part in name.replace("\\", "/").split("/") if part] for name in names]
    paths = [path[:-1] if path[-1:] == ["controlnet"] and path[:-1] else path for path in paths]
    for count in range(1, max(map(len, paths)) + 1):
        titles = ["-".join(path[-count:]) for path in paths]
        if len(set(titles)) == len(titles):
            return titles
    return [f"{number}-{'-'.join(path[-1:])}" for number, path in enumerate(paths)]


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


def load_pipeline(
    config: PipelineConfig,
    base: Path,
    folders: Sequence[Path],
    *,
    batch_size: int,
    with_text_encoders: bool = True,
) -> StableDiffusion3ControlNetPipeline:
    """Return the stock pipeline with ControlNets, placed on the device as the settings say.

    Args:
        config: settings of the run, with a number format.
        base: folder of the base model.
        folders: folder of the ControlNet, or of several that are combined.
        batch_size: pictures drawn at a time.
        with_text_encoders: whether the text encoders are loaded.

    Raises:
        ConfigError: --offload needs a device other than the CPU.
    """
    device = pick_device(config.device)
    check_offload(config.offload, device)
    keep_freed_memory(device)
    free_memory()
    offload = find_offload(
        config, base, folders, device, batch_size=batch_size, with_text_encoders=with_text_encoders
    )
    networks = [load_controlnet(folder, config) for folder in folders]
    absent = {} if with_text_encoders else dict.fromkeys(TEXT_COMPONENTS)
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        base,
        controlnet=networks[0] if len(networks) == 1 else SD3MultiControlNetModel(networks),
        dtype=getattr(torch, config.dtype),
        variant=config.variant,
        **absent,
    )
    if config.shift is not None:
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipeline.scheduler.config, shift=config.shift
        )
    if config.quantize_base is not None:
        quantize(pipeline.transformer.requires_grad_(False), config.quantize_base, device)
    save_memory(pipeline.vae, tiling=config.vae_tiling)
    if config.compile:
        compile_blocks(pipeline.transformer, *networks)
    place(pipeline, offload, device)
    return pipeline


def find_offload(
    config: PipelineConfig,
    base: Path,
    folders: Sequence[Path],
    device: torch.device,
    *,
    batch_size: int,
    with_text_encoders: bool,
) -> Offload:
    """Return the offload of the settings; for `auto`, the fastest that fits a GPU's free memory."""
    if config.offload != "auto":
        return config.offload
    if device.type != "cuda":
        return "none"  # other devices share their memory with the host
    drawings = simulate_sets(
        config,
        base,
        [folders],
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


@contextlib.contextmanager
def full_memory_explained(config: PipelineConfig) -> Iterator[None]:
    """Turn an error about full memory into one that names the options that would save some.

    Args:
        config: settings of the run, with a number format.

    Raises:
        RunError: memory is full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, config) from error


def out_of_memory(error: RuntimeError, config: PipelineConfig) -> RunError:
    """Return an error that names the options that would save memory, the best first.

    Args:
        error: torch's.
        config: settings of the run, with a number format.
    """
    helpful = [flags for flags, _ in remedies(config)]
    helpful.append("a smaller --resolution, or --height and --width")
    return RunError(
        f"out of memory: {first_line(error)} Finished pictures are kept. What helps, the most "
        f"first: {'; '.join(helpful)}."
    )
